"""Fit the learned heads of selection methods to a frozen model, from its own attention on ordinary text.

data      text files -> windows of tokens: for fitting, for stopping early, for the score
capture   one forward a window -> of every full-attention layer the queries, block summaries and attention masses
fit       each layer's head alone: the eviction head (NOSA's shape), the gate (SeerAttention-R's)
score     recall of attention mass and hit rate on the last window, beside oracle, mean key and heat
run       all of it, and the side file
"""
