"""How much memory each stage of a recipe will take, before anything is loaded.

`cards` and `result` import no torch. `work` makes a forecast, in a worker: each stage's own trainer takes two steps on
tensors that have shapes and no numbers (`shapes`, `model`, `stage`).
"""
