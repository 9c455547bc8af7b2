"""The guard: what may be claimed. It returns verdicts and estimates, and acts on nothing.

`review` watches a running search and says when to stop; `pareto` weighs several objectives;
`estimates` says how sure a number is, and whether a winner is better than the best parent,
`selection` how much of it is the luck of the best of many. `contamination` finds what splits share,
`benchmarks` what of them is a public test set. Knows nothing of models or stores.
"""
