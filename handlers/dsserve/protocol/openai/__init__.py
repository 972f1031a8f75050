"""OpenAI's API: bodies, endpoints, replies, and the document that describes them."""
