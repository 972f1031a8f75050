"""From logits to a token: penalties, grammars, filters, the draw; on the host and on a GPU."""
