"""How a call becomes kernels: layouts, block lists, plans, the lowering to the fused operators, the guard."""
