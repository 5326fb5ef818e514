"""A bridge for code written with the library ``higher``: change the import, keep the loop.

.. code-block:: python

    import innerloop.higher as higher

    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        diffopt.step(loss_fn(fmodel(x), y))
        loss_fn(fmodel(xq), yq).backward()  # model.parameters() receive .grad

Every public name of ``higher`` 0.2.1 and of its git head is here and in the modules `optim`,
`patch` and `utils`. It stands on innerloop's own optimizers and module view, and is right where
``higher`` was wrong: hooks fire, submodules can be called alone, patched modules can be copied and
pickled, ``maximize``, ``decoupled_weight_decay``, a tensor learning rate and schedulers are
honoured, a hyper-parameter of value 0 gets its gradient, the derivatives in Adam's beta2 and ASGD's
lr are right, and Adam's ``eps`` stands where PyTorch has it (after the bias correction). Optimizers
that ``higher`` never had work too.
"""

from innerloop.higher import optim, patch, utils
from innerloop.higher._context import innerloop_ctx
from innerloop.higher.optim import (
    DifferentiableOptimizer,
    create_diff_optim,
    get_diff_optim,
    register_optim,
)
from innerloop.higher.patch import PatchedModule, monkeypatch

__all__ = [
    "DifferentiableOptimizer",
    "PatchedModule",
    "create_diff_optim",
    "get_diff_optim",
    "innerloop_ctx",
    "monkeypatch",
    "optim",
    "patch",
    "register_optim",
    "utils",
]
