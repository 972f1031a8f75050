"""For who works on the project: what can be removed, what is known to be vulnerable."""
