"""Chat rows against TRL and against expectations checked by hand.

`trl/` has templates that render and mark what TRL's training templates do, `trl.json` what TRL makes of conversations
with its own; `stock/` has templates that render what the models' own do. `oracle.py` writes and compares them.
`expected/` has renderings of stock templates, with what is trained between ⟦ and ⟧.
"""
