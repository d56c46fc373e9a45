"""What a training step costs, counted and not estimated: the real step runs on fake tensors.

Fake tensors have shapes but no memory, so that a ViT-H is counted in seconds on any machine, without a GPU. FLOPs are
torch's own count (matrix products and convolutions, two for a multiply-add), with our formulas where torch has none. Bytes
are those of every storage that lives during the step, followed from its birth to its end, and sorted by what they are for.
What a kernel allocates for itself and frees before it returns is not seen.
"""

from leanmim.costs.counting import StepCost, count, count_phase
from leanmim.costs.flops import Flops
from leanmim.costs.tables import Comparison, Uncounted, compare, cost

__all__ = ["Comparison", "Flops", "StepCost", "Uncounted", "compare", "cost", "count", "count_phase"]
