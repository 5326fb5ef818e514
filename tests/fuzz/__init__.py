"""Random trainings against finite differences of a plain torch run: ``python -m tests.fuzz``.

A case is drawn from a seed and a number: a model family, a loss, an optimizer with its flags, a
front end and a strategy. What the library says of it is compared with the derivative of the same
training written with ``torch.optim`` alone. Only public names of innerloop are used here.
"""
