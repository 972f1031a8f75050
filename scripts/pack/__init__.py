"""What travels: the archive, compiled operations, the OpenAPI document."""
