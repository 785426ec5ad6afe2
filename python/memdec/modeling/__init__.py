"""Models: what a causal LM is made of, its keys and scores, and the composite of a base and a memory."""
