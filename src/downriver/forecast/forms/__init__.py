"""The shapes that laws have: value and analytic jacobian in coordinates in which every fit is well conditioned.

Reach for one when you fit a law of your own with ``fit_law``; the laws of this room bring theirs. A form works on
*internal* coordinates: inputs divided by a size typical of them, the target by its mean, amplitudes as logarithms. The
*natural* parameters of the formula are what users see.
"""

from downriver.forecast.forms.falling import Chinchilla, PowerLaw, SmoothlyBroken, TiedChinchilla
from downriver.forecast.forms.form import Array, Form, Units
from downriver.forecast.forms.of_loss import ExpOfLoss, ExpOfLossFrom, Sigmoid
from downriver.forecast.forms.rising import LogLaw, PassRate, PowerGrowth

__all__ = [
    "Array",
    "Chinchilla",
    "ExpOfLoss",
    "ExpOfLossFrom",
    "Form",
    "LogLaw",
    "PassRate",
    "PowerGrowth",
    "PowerLaw",
    "Sigmoid",
    "SmoothlyBroken",
    "TiedChinchilla",
    "Units",
]
