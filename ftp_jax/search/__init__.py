"""Schedule search: a jitted genetic algorithm over block sparsities, driven from the host.

It takes a fitness function and knows no model.

Axes: L blocks, P candidates of the population, C children of one generation, K schedules in general,
V schedules validated so far.
"""
