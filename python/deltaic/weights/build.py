"""How do stored tensors become the weights that the model calls? Packs them one after another through an op set. At any
time only the tensors of one packed matrix are mapped besides what is already packed, so that loading never needs much
more memory than the packed model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import ArgumentError, CheckpointError
from ..model.config import FULL_ATTENTION, ModelConfig, TextConfig
from ..model.weights import (
    Array,
    AttentionMixer,
    DeltaMixer,
    DenseFFN,
    Layer,
    MtpWeights,
    SparseFFN,
    TextWeights,
    VisionBlock,
    VisionWeights,
    Weight,
)
from .checkpoint import Checkpoint, Tensor
from .names import PATCH, SMALL, VECTOR, TensorTable, resolve

DTYPES = ("f32", "bf16")
_COMPARE_ROWS = 4096


def format_of(role: str, dtype: str) -> str:
    """The format in which a tensor of `role` (weights/names.py) is packed when the model is loaded as `dtype`.

    Raises ArgumentError if `dtype` is not one of DTYPES.
    """
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if role in (PATCH, VECTOR):
        return "f32"
    if role == SMALL:
        return "f32" if dtype == "f32" else "bf16"
    return dtype


def build_text(
    checkpoint: Checkpoint, config: ModelConfig, ops: Any, dtype: str = "bf16", progress: bool | None = None
) -> TextWeights:
    """Pack the decoder. `ops` is an op set (a module with `pack` and `pack_glu`).

    `progress`: True shows a bar on stderr, False none, None one if stderr is a terminal. The same for the two below.
    Raises CheckpointError if the checkpoint does not fit `config`, or memory runs out; ArgumentError for the dtype.
    """
    packer = _Packer(checkpoint, config, ops, dtype)
    text = config.text
    names = [name for name in packer.table.specs if not name.startswith(("visual.", "mtp."))]
    with packer.progress_bar("Packing the text model", names, progress):
        # The two largest matrices come first: while they are mapped, little else is packed yet.
        if text.tie_word_embeddings:
            packer.check_tied_head()
        embed = packer.pack(["embed_tokens.weight"])
        head = embed if text.tie_word_embeddings else packer.pack(["lm_head.weight"])
        layers = [_layer(packer, text, f"layers.{i}.", kind) for i, kind in enumerate(text.layer_types)]
        return TextWeights(embed, layers, packer.vector("norm.weight"), head)


def build_vision(
    checkpoint: Checkpoint, config: ModelConfig, ops: Any, dtype: str = "bf16", progress: bool | None = None
) -> VisionWeights:
    """Pack the vision tower. Raises as `build_text`, and ArgumentError if the model has no vision tower."""
    if config.vision is None:
        raise ArgumentError(f"{checkpoint.source} has no vision tower: config.json describes none")
    packer = _Packer(checkpoint, config, ops, dtype)
    names = [name for name in packer.table.specs if name.startswith("visual.")]
    with packer.progress_bar("Packing the vision tower", names, progress):
        patch, patch_b = packer.affine("visual.patch_embed.proj", _sum_frames)
        blocks = [_vision_block(packer, f"visual.blocks.{i}.") for i in range(config.vision.depth)]
        fc1, fc1_b = packer.affine("visual.merger.linear_fc1")
        fc2, fc2_b = packer.affine("visual.merger.linear_fc2")
        return VisionWeights(
            patch=patch,
            patch_b=patch_b,
            pos_embed=packer.vector("visual.pos_embed.weight"),
            blocks=blocks,
            merger_norm_w=packer.vector("visual.merger.norm.weight"),
            merger_norm_b=packer.vector("visual.merger.norm.bias"),
            fc1=fc1,
            fc1_b=fc1_b,
            fc2=fc2,
            fc2_b=fc2_b,
        )


def build_mtp(
    checkpoint: Checkpoint, config: ModelConfig, ops: Any, dtype: str = "bf16", progress: bool | None = None
) -> MtpWeights:
    """Pack the multi-token-prediction layer. Raises as `build_text`, and CheckpointError if the files hold none."""
    packer = _Packer(checkpoint, config, ops, dtype)
    if not packer.table.has_mtp:
        raise CheckpointError(f"{checkpoint.source} holds no multi-token-prediction layer (mtp.* tensors)")
    names = [name for name in packer.table.specs if name.startswith("mtp.")]
    with packer.progress_bar("Packing the MTP layer", names, progress):
        return MtpWeights(
            embedding_norm=packer.vector("mtp.pre_fc_norm_embedding.weight"),
            hidden_norm=packer.vector("mtp.pre_fc_norm_hidden.weight"),
            fc=packer.pack(["mtp.fc.weight"]),
            layer=_layer(packer, config.text, "mtp.layers.0.", FULL_ATTENTION),
            norm=packer.vector("mtp.norm.weight"),
        )


def _layer(packer: _Packer, config: TextConfig, layer: str, layer_type: str) -> Layer:
    mixer = _attention if layer_type == FULL_ATTENTION else _delta
    return Layer(
        input_norm=packer.vector(layer + "input_layernorm.weight"),
        mixer=mixer(packer, layer),
        post_norm=packer.vector(layer + "post_attention_layernorm.weight"),
        ffn=_sparse(packer, layer + "mlp.", config.num_experts) if config.is_moe else _dense(packer, layer + "mlp."),
    )


def _delta(packer: _Packer, layer: str) -> DeltaMixer:
    mixer = layer + "linear_attn."
    return DeltaMixer(
        in_proj=packer.pack([f"{mixer}in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")]),
        conv_weight=packer.vector(mixer + "conv1d.weight", _taps_first),
        A_log=packer.vector(mixer + "A_log"),
        dt_bias=packer.vector(mixer + "dt_bias"),
        norm=packer.vector(mixer + "norm.weight"),
        out_proj=packer.pack([mixer + "out_proj.weight"]),
    )


def _attention(packer: _Packer, layer: str) -> AttentionMixer:
    mixer = layer + "self_attn."
    return AttentionMixer(
        qkv_proj=packer.pack([f"{mixer}{part}_proj.weight" for part in ("q", "k", "v")]),
        q_norm=packer.vector(mixer + "q_norm.weight"),
        k_norm=packer.vector(mixer + "k_norm.weight"),
        o_proj=packer.pack([mixer + "o_proj.weight"]),
    )


def _dense(packer: _Packer, mlp: str) -> DenseFFN:
    return DenseFFN(packer.pack_glu(mlp), packer.pack([mlp + "down_proj.weight"]))


def _sparse(packer: _Packer, mlp: str, num_experts: int) -> SparseFFN:
    router = packer.pack([mlp + "gate.weight"])
    if mlp + "experts.gate_up_proj" in packer.table.specs:
        gate_up = packer.pack_fused_glu(mlp + "experts.gate_up_proj")
        down = packer.pack([mlp + "experts.down_proj"])
    else:
        experts = [f"{mlp}experts.{e}." for e in range(num_experts)]
        gate_up = packer.pack_glu_stack(experts)
        down = packer.pack_stack([expert + "down_proj.weight" for expert in experts])
    return SparseFFN(
        router=router,
        gate_up=gate_up,
        down=down,
        shared_gate_up=packer.pack_glu(mlp + "shared_expert."),
        shared_down=packer.pack([mlp + "shared_expert.down_proj.weight"]),
        shared_gate=packer.pack([mlp + "shared_expert_gate.weight"]),
    )


def _vision_block(packer: _Packer, block: str) -> VisionBlock:
    qkv, qkv_b = packer.affine(block + "attn.qkv")
    proj, proj_b = packer.affine(block + "attn.proj")
    fc1, fc1_b = packer.affine(block + "mlp.linear_fc1")
    fc2, fc2_b = packer.affine(block + "mlp.linear_fc2")
    return VisionBlock(
        norm1_w=packer.vector(block + "norm1.weight"),
        norm1_b=packer.vector(block + "norm1.bias"),
        qkv=qkv,
        qkv_b=qkv_b,
        proj=proj,
        proj_b=proj_b,
        norm2_w=packer.vector(block + "norm2.weight"),
        norm2_b=packer.vector(block + "norm2.bias"),
        fc1=fc1,
        fc1_b=fc1_b,
        fc2=fc2,
        fc2_b=fc2_b,
    )


def _taps_first(conv: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[C, 1, 4] as stored -> [4, C], so that one tap is contiguous over the channels."""
    return conv[:, 0, :].T


def _sum_frames(patch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[W, 3, 2, p, p] -> [W, 3*p*p]: a still picture shows the same pixels to both frames, so their weights add up."""
    return patch.astype(np.float32).sum(axis=2).reshape(patch.shape[0], -1)


class _Packer:
    """Reads tensors by name, packs them, gives the mapped pages back and moves the progress bar."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, ops: Any, dtype: str):
        format_of(VECTOR, dtype)  # refuse an unknown dtype before any work
        self.table: TensorTable = resolve(checkpoint, config)
        self._ops, self._dtype = ops, dtype
        self._bar: Any = None

    @contextmanager
    def progress_bar(self, title: str, names: Sequence[str], progress: bool | None) -> Iterator[None]:
        """Counts the bytes of `names` on stderr while the block runs, if `progress` says so."""
        show = sys.stderr is not None and sys.stderr.isatty() if progress is None else progress
        if not show:
            yield
            return
        from tqdm import tqdm

        total = sum(self.table.tensors[name].nbytes for name in names)
        with tqdm(total=total, desc=title, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True) as bar:
            self._bar = bar
            yield

    def pack(self, names: Sequence[str]) -> Weight:
        """Matrices that read the same input, packed as one: their rows follow each other in the order of `names`."""
        formats = [self._format(name) for name in names]
        return self._run(names, lambda arrays: self._ops.pack(arrays, formats))

    def pack_glu(self, prefix: str) -> Weight:
        """`gate_proj` and `up_proj` under `prefix` [I, K] -> (2I, K)."""
        names = [prefix + "gate_proj.weight", prefix + "up_proj.weight"]
        return self._run(names, lambda arrays: self._ops.pack_glu(arrays[0], arrays[1], self._format(names[0])))

    def pack_fused_glu(self, name: str) -> Weight:
        """Experts stored as [E, 2I, K], gate rows first -> (E, 2I, K), from views: nothing is copied here."""

        def halves(arrays: list[np.ndarray[Any, Any]]) -> Weight:
            middle = arrays[0].shape[1] // 2
            return self._ops.pack_glu(arrays[0][:, :middle], arrays[0][:, middle:], self._format(name))

        return self._run([name], halves)

    def pack_stack(self, names: Sequence[str]) -> Weight:
        """Experts stored one by one [N, K] -> (E, N, K)."""
        return self._run(names, lambda arrays: self._ops.pack([np.stack(arrays)], [self._format(names[0])]))

    def pack_glu_stack(self, experts: Sequence[str]) -> Weight:
        """`gate_proj` and `up_proj` [I, K] of experts stored one by one -> (E, 2I, K)."""
        gates = [expert + "gate_proj.weight" for expert in experts]
        ups = [expert + "up_proj.weight" for expert in experts]

        def stacked(arrays: list[np.ndarray[Any, Any]]) -> Weight:
            gate, up = np.stack(arrays[: len(gates)]), np.stack(arrays[len(gates) :])
            return self._ops.pack_glu(gate, up, self._format(gates[0]))

        return self._run(gates + ups, stacked)

    def affine(
        self, name: str, transform: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] | None = None
    ) -> tuple[Weight, Array]:
        """`name`.weight packed (after `transform`), and `name`.bias."""
        weight_name = name + ".weight"
        formats = [self._format(weight_name)]
        weight = self._run(
            [weight_name],
            lambda arrays: self._ops.pack([transform(arrays[0]) if transform else arrays[0]], formats),
        )
        return weight, self.vector(name + ".bias")

    def vector(
        self, name: str, transform: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] | None = None
    ) -> Array:
        """A contiguous float32 array of its own memory, after `transform`."""

        def convert(arrays: list[np.ndarray[Any, Any]]) -> Array:
            array = transform(arrays[0]) if transform else arrays[0]
            return np.array(array, dtype=np.float32, order="C", copy=True)

        result: Array = self._run([name], convert)
        return result

    def check_tied_head(self) -> None:
        """A head that is stored although it is tied must be the embedding, bit for bit."""
        head, embed = self.table.tensors.get("lm_head.weight"), self.table.tensors["embed_tokens.weight"]
        if head is None:
            return
        if not _equal_bits(head, embed):
            raise CheckpointError(
                f"{head.file.path} holds an lm_head.weight that differs from embed_tokens.weight, although config.json "
                f"says tie_word_embeddings = true; set it to false to use the stored head, or remove lm_head.weight"
            )
        self._finished([head])

    def _format(self, name: str) -> str:
        return format_of(self.table.specs[name].role, self._dtype)

    def _run(self, names: Sequence[str], work: Callable[[list[np.ndarray[Any, Any]]], Any]) -> Any:
        tensors = [self.table.tensors[name] for name in names]
        try:
            result = work([_readable(tensor.read()) for tensor in tensors])
        except MemoryError:
            raise CheckpointError(
                f"not enough memory to pack {tensors[0].name} {list(tensors[0].shape)} of {tensors[0].file.path}; "
                f"free memory, or load a smaller model or dtype"
            ) from None
        self._finished(tensors)
        return result

    def _finished(self, tensors: Sequence[Tensor]) -> None:
        for file in {tensor.file for tensor in tensors}:
            file.release()
        if self._bar is not None:
            self._bar.update(sum(tensor.nbytes for tensor in tensors))


def _readable(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Op sets pack float32 and bfloat16; float16 fits into float32 exactly."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _equal_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype:
        return False
    a, b = first.read(), second.read()
    bits = np.dtype(f"u{a.dtype.itemsize}")  # NaN equals itself, -0 differs from 0
    rows = range(0, a.shape[0], _COMPARE_ROWS)
    return all(np.array_equal(a[i : i + _COMPARE_ROWS].view(bits), b[i : i + _COMPARE_ROWS].view(bits)) for i in rows)
