"""What does `deltaic info` tell? Facts about this installation, and about a checkpoint without loading it."""

from __future__ import annotations

import math
from typing import Any

from .errors import DeltaicError


def installation_facts() -> dict[str, Any]:
    """Version, kernels and what this process may use of the machine."""
    import platform

    import deltaic

    from .machine import default_threads, memory_bytes
    from .ops.cuda_device import facts as cuda_facts
    from .ops.devices import op_set

    try:
        isa = op_set("cpu").isa()
    except DeltaicError as error:  # the one fact that may be missing, and the reason to have asked
        isa = f"none ({' '.join(str(error).split())})"
    return {
        "version": deltaic.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "isa": isa,
        "threads": default_threads(),
        "memory": memory_bytes(),
        **cuda_facts(),
    }


def checkpoint_facts(path_or_id: str) -> dict[str, Any]:
    """What a checkpoint or a packed folder holds, from its configuration and headers; no weight is read."""
    from .model.config_file import load_config
    from .weights.checkpoint import open_checkpoint
    from .weights.hub import find_model
    from .weights.names import expected_tensors
    from .weights.packed import PACKED_FILE, PackedFile

    folder = find_model(path_or_id)
    config = load_config(folder)
    text = config.text
    if (folder / PACKED_FILE).exists():
        with PackedFile(folder) as packed:
            found = {"mtp.fc.weight"} if packed.has_mtp else {"norm.weight"}
            shapes = {name: spec.shape for name, spec in expected_tensors(config, found).items()}
            files = {
                "file_bytes": packed.nbytes,
                "stored_as": f"{packed.precision}, vision {packed.precision.vision}",
                "packed_from": packed.fingerprint,
            }
    else:
        with open_checkpoint(folder) as checkpoint:
            tensors = list(checkpoint.tensors.values())
        shapes = {t.name: t.shape for t in tensors}
        files = {
            "file_bytes": sum(t.nbytes for t in tensors),
            "stored_as": ", ".join(sorted({t.dtype for t in tensors})),
        }

    def count(prefixes: tuple[str, ...]) -> int:
        return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefixes))

    return {
        "folder": str(folder),
        "architecture": config.architecture,
        "layers": f"{text.num_delta_layers} gated delta net, {text.num_attention_layers} gated attention",
        "experts": f"{text.num_experts}, {text.num_experts_per_tok} per token" if text.is_moe else "none (dense)",
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "context_length": text.max_position_embeddings,
        "parameters": count(("",)),
        "vision_parameters": count(("model.visual.", "visual.")),
        "mtp_parameters": count(("mtp.",)),
        "tensors": len(shapes),
        **files,
    }
