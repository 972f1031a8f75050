"""Prometheus and Grafana: the dashboard as a file, and its picture."""
