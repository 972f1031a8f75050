"""A TorchServe: started, asked, watched, drained, replaced, stopped."""
