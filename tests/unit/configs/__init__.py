"""Tests of configs/: settings, images, manifests, dashboards, the chat page."""
