# ruff: noqa
# mypy: ignore-errors
# fmt: off
"""The notebook this project started from, as a script: only its import and magic lines are changed.

    python examples/seed_notebook.py

It was written for the library higher. Changed lines: those that name higher now name innerloop.higher, its bridge; those
that load IPython extensions or modules of another project, and the unused numpy, are gone. The rest is as it was.
"""

import torch
from torch import nn
from torch import optim
from torch.autograd import grad
import innerloop.higher as higher
from innerloop.higher import innerloop_ctx
from innerloop.higher.optim import DifferentiableSGD


class Model(nn.Module):
    
    def __init__(self, a=2., b=3.):
        super().__init__()
        # Use nn.Modules
        self.a = nn.Linear(1,1,False)
        self.a.weight.data.fill_(a)
        self.b = nn.Linear(1,1,False)
        self.b.weight.data.fill_(b)
        # Or custom parameters (toggle comments in forward()):
        # self.a = nn.Parameter(torch.ones(1, requires_grad=True) * a)
        # self.b = nn.Parameter(torch.ones(1, requires_grad=True) * b)
    
    def forward(self, x):
        return self.a(self.a(x)) + self.b(self.b(x))    # with modules
        # return (self.a ** 2 + self.b ** 2) * x        # with custom


class Opt(DifferentiableSGD):
    
    def _update(self, grouped_grads, **kwargs) -> None:
        print('d Loss / d params(t=0): a_[0]:{:.3f} \t b_[0]{:.3f}'.format(*[g.item() for g in grouped_grads[0]]))
        return super()._update(grouped_grads, **kwargs)
        

higher.register_optim(optim.SGD, Opt)


# Code for higher order gradients
x = torch.ones(1) * 0.1
a, b = 3, 4    # true parameter values
m = Model()
o = optim.SGD(m.parameters(), lr=1.)
# Single training step t=0 ==> t=1
with higher.innerloop_ctx(m, o, copy_initial_weights=False) as (hm, ho):
    y_ = hm(x)
    y = (a**2 + b**2) * x
    loss = 0.5 * (y_ - y) ** 2

    print('Inner optimization')
    print('Loss:\t\t{:.3f}'.format(loss.item()))
    print('d Loss / d y_: {:.3f}'.format(torch.autograd.grad(loss, y_, retain_graph=True)[0].item()))
    print('Current params: \ta_[0]:{:.3f} \t b_[0]:{:.3f}'.format(
          *[p.item() for p in hm.parameters(time=0)]))
    
    # This populates grads in `m` when copy_initial_weights=False
    ho.step(loss)
    
    print('Updated params: \ta_[1]:{:.3f} \t b_[1]:{:.3f}'.format(
          *[p.item() for p in hm.parameters(time=1)]))
    
    print('d a_[1] / d param(t=0): a_[0]:{:.3f} \t b_[0]:{:.3f}'.format(
          *[g.item() for g in \
            torch.autograd.grad(list(hm.parameters(time=1))[0],  # this is first param at t=1 (a_[1])
                                hm.parameters(time=0),           # w.r.t all params at t=0
                                retain_graph=True)]))
    
    print()
    y_ = hm(x)
    y = (a**2 + b**2) * x
    testloss = 0.5 * (y_ - y) ** 2
    testloss.backward(retain_graph=True)

    print('Outer optimization using test loss')
    print('TL:\t\t{:.3f}'.format(testloss.item()))
    print('d TL / d a_[0] = [\td TL / d a_[1] * d a_[1] / d a_[0] +\n\t\t\td TL / d b_[1] * d b_[1] / d a_[0] ]')
    print('%.3f' % list(m.parameters())[0].grad.item(), '=',
          '%.3f' % grad(testloss, list(hm.parameters(time=1))[0], retain_graph=True)[0].item(), '*',
          '%.3f' % grad(list(hm.parameters(time=1))[0], list(hm.parameters(time=0))[0], retain_graph=True)[0].item(),
          ' + ',
          '%.3f' % grad(testloss, list(hm.parameters(time=1))[1], retain_graph=True)[0].item(), '*',
          '%.3f' % grad(list(hm.parameters(time=1))[1], list(hm.parameters(time=0))[0])[0].item())
    
    o.step()  # Outer update (meta-update) using d TL / d params
    print('Final parameters:')
    print(*m.parameters())


# Higher order gradient tracking with multiple models.

M, m = Model(), Model()
m.load_state_dict(M.state_dict())
O, o = optim.SGD(M.parameters(), lr=1.), optim.SGD(m.parameters(), lr=1.)

with higher.innerloop_ctx(m, o, copy_initial_weights=False) as (hm, ho):
    y_ = hm(x)
    y = (a**2 + b**2) * x
    loss = 0.5 * (y_ - y) ** 2
    ho.step(loss)
    
    y_ = hm(x)
    y = (a**2 + b**2) * x
    testloss = 0.5 * (y_ - y) ** 2
    testloss.backward(retain_graph=True)
    
    for P, p0, p1 in zip(M.parameters(), hm.parameters(time=0), hm.parameters(time=1)):
        if P.grad is None:
            P.grad = torch.zeros_like(P)
        P.grad.add_(grad(testloss, p0, retain_graph=True)[0])
    
    O.step()
    print('Final parameters:')
    print(*M.parameters())
