"""Measuring what a memory is worth: perplexity by two protocols, the kNN-LM beside it, and a report one can look at.

`perplexity` holds the two ways of counting, `knn_lm` the retriever as a rival, `overlap` what held-out and training
text share, `evaluate` puts all of it on the same tokens, `report` and `charts` draw the page.
"""
