"""The guard: what may be claimed. It returns verdicts and estimates, and acts on nothing.

`review` watches a running search and says when to stop; `pareto` weighs several objectives;
`estimates` says how sure a number is, how much of it is luck, and whether a winner is better than
the best parent. Knows nothing of models or stores.
"""
