"""The optional package tree-recurrence: layers that carry a state follow a batch's tree.

With it a state-space, linear-attention or short-convolution layer starts every branch from the state its trunk ends
in. It reads the same `tree_*` fields as attention does, and hooks the modeling modules of transformers, which leaves
calls without these fields as they are. This module is all that knows of it.
"""

import importlib
import importlib.util
from typing import Any

INSTALL = "pip install tree-recurrence"


def follows_trees(model: Any) -> str | None:
    """Make a model's recurrent layers follow trees.

    Args:
        model: a causal LM of transformers, not PEFT's wrapper.

    Returns:
        None where they do now; else why they don't.
    """
    if importlib.util.find_spec("tree_recurrence") is None:
        return f"its layers carry a state from token to token ({INSTALL} may let them follow shared prompts)"
    tree_recurrence: Any = importlib.import_module("tree_recurrence")  # untyped where it is not installed
    support = tree_recurrence.install(model)
    if support.mode == "tree":
        return None
    tree_recurrence.uninstall(model)
    return f"its layers carry a state from token to token, and tree-recurrence answers: {support.reason}"
