"""Trains the bundled miniature from nothing and writes its folder: `python bench/miniature/train.py`.

Needs torch, transformers and a C++ compiler, and uses one thread. Seeds fix weights and batches. First the vision tower
learns to name what it sees, then the whole model to answer; the learning rate warms up, stays, and falls to zero over
the last steps. Then the trunk is frozen and the draft (MTP) layer learns the trunk's own greedy tokens. An interrupted
run continues from its resume file and gives the same weights. Creating the file `finish` beside that file starts the
fall at once (the log then names the equal `--steps`).
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import data
import muon
import network
import package
import scenes
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3_5MoeForConditionalGeneration
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter

WARM_UP = 100
BALANCE = 0.01
DRAFT_RATE = 3e-3
LESSON_STEPS = 1500
LESSON_PICTURES = 32


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=package.FOLDER, help="where the miniature is written")
    parser.add_argument("--steps", type=int, default=6000, help="steps of the trunk, the falling ones included")
    parser.add_argument("--decay-steps", type=int, default=2000, help="steps over which the learning rate falls")
    parser.add_argument("--lesson-steps", type=int, default=LESSON_STEPS)
    parser.add_argument("--draft-steps", type=int, default=800, help="steps of the draft layer after the trunk's")
    parser.add_argument("--rate", type=float, default=1.2e-3, help="highest learning rate of AdamW")
    parser.add_argument("--muon", type=float, default=0.02, help="highest learning rate of Muon")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--work", type=Path, default=Path("miniature-run"), help="resume file, continued when present")
    return parser.parse_args()


class RouterWatch:
    """Collects router logits of a forward pass and turns them into the load-balancing loss (E * sum f_e * p_e)."""

    def __init__(self, *modules: nn.Module) -> None:
        self.logits: list[Tensor] = []
        for module in modules:
            for part in module.modules():
                if isinstance(part, Qwen3_5MoeTopKRouter):
                    part.register_forward_hook(lambda _, __, output: self.logits.append(output[0]))

    def loss(self, valid: Tensor) -> Tensor:
        """Mean over layers since the last call; `valid` [B*T] leaves padding out where a layer saw every token."""
        total = torch.zeros(())
        for logits in self.logits:
            p = (logits[valid] if len(logits) == len(valid) else logits).softmax(-1)
            chosen = torch.zeros_like(p).scatter_(1, p.topk(2, dim=-1).indices, 0.5)
            total = total + p.shape[1] * (chosen.mean(0) * p.mean(0)).sum()
        total = total / max(len(self.logits), 1)
        self.logits.clear()
        return total


class Optimisers:
    """Muon for matrices between hidden vectors, AdamW for everything else; one schedule moves both learning rates."""

    def __init__(self, modules: list[nn.Module], rate: float, muon_rate: float) -> None:
        named = [item for m in modules for item in m.named_parameters()]
        hidden = [p for name, p in named if self.is_hidden(name, p)] if muon_rate else []
        rest = [p for _, p in named if not any(p is h for h in hidden)]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)]
        if hidden:
            self.parts.append(muon.Muon(hidden, muon_rate, 0.05))
        self.highest = (rate, muon_rate)

    @staticmethod
    def is_hidden(name: str, p: Tensor) -> bool:
        """Whether Muon serves it: not embeddings, convolutions, heads, or matrices with a very short side."""
        return p.ndim in (2, 3) and min(p.shape[-2:]) >= 32 and "embed" not in name and "heads" not in name

    def step(self, share: float) -> None:
        """Updates with `share` of the highest rates and forgets the gradients."""
        for part, highest in zip(self.parts, self.highest, strict=False):
            for group in part.param_groups:
                group["lr"] = highest * share
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        """Of both."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Of both."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def schedule(step: int, steps: int, decay_steps: int, warm_up: int = WARM_UP) -> float:
    """Share of the highest learning rate: linear warm-up, constant, then half a cosine down to a hundredth."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - (steps - decay_steps)) / max(decay_steps, 1)
    return 1.0 if done <= 0 else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Naming(nn.Module):
    """Linear heads that name what an image token shows: colour, shape, place (0: nothing). Used in training only."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.sizes = (1 + len(scenes.COLOURS), 1 + len(scenes.SHAPES), 10)
        self.heads = nn.Linear(hidden, sum(self.sizes))

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of features [B, N, H] against targets [B, N, 3]; shapes, and tokens that show something, weigh
        more."""
        weights = torch.where(targets[..., 0] > 0, 1.0, 0.1)
        parts = self.heads(features).split(self.sizes, dim=-1)
        losses = [F.cross_entropy(p.transpose(1, 2), targets[..., i], reduction="none") for i, p in enumerate(parts)]
        return ((losses[0] + 3 * losses[1] + losses[2]) * weights).sum() / weights.sum()

    @torch.no_grad()
    def right(self, features: Tensor, targets: Tensor) -> list[float]:
        """Shares of right colours, shapes and places among tokens that show something."""
        shown = targets[..., 0] > 0
        parts = self.heads(features).split(self.sizes, dim=-1)
        return [round(float((p.argmax(-1) == targets[..., i])[shown].float().mean()), 2) for i, p in enumerate(parts)]


def train_vision(args: argparse.Namespace, model: Qwen3_5MoeForConditionalGeneration, naming: Naming) -> None:
    """Lessons for the vision tower alone: features from which a linear map can name things."""
    modules = [model.model.visual, naming]
    parameters = [p for m in modules for p in m.parameters()]
    opt = Optimisers(modules, args.rate, args.muon)
    losses, started = [], time.perf_counter()
    for step in range(args.lesson_steps):
        pixels, grid, targets = data.lesson_batch(random.Random(f"{args.seed}/vision {step}"), LESSON_PICTURES)
        features = network.vision_forward(model.model.visual, pixels, grid)
        loss = naming(features, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step(schedule(step, args.lesson_steps, args.lesson_steps // 2))
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            right, seconds = naming.right(features.detach(), targets), (time.perf_counter() - started) / (step + 1)
            say(f"lesson {step + 1} right {right} loss {sum(losses) / len(losses):.4f} {seconds:.3f} s/step")
            losses = []


def trunk_loss(
    model: Qwen3_5MoeForConditionalGeneration, watch: RouterWatch, naming: Naming, batch: data.Batch, weight: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the learnt tokens; load-balancing and naming losses, weighted."""
    labels = F.pad(batch.labels[:, 1:], (0, 1), value=data.IGNORED)
    learnt = labels != data.IGNORED
    hidden, _, features = network.trunk_forward(
        model, batch.ids, batch.positions, batch.pictures, learnt.flatten().nonzero()[:, 0]
    )
    logits = F.linear(hidden, model.lm_head.weight)
    valid = (torch.arange(batch.ids.shape[1])[None] < row_lengths(batch)[:, None]).flatten()
    extra = BALANCE * watch.loss(valid)
    if features is not None and batch.targets is not None:
        extra = extra + weight * naming(features, batch.targets)
    return F.cross_entropy(logits, labels[learnt]), extra


def row_lengths(batch: data.Batch) -> Tensor:
    """Tokens before the padding, per row (padding has id 0 and position 0)."""
    index = torch.arange(batch.ids.shape[1])
    used = (batch.positions[0] > 0) | (batch.ids > 0)
    return torch.where(used, index, 0).max(1).values + 1


def train_trunk(
    args: argparse.Namespace, tokenizer: Tokenizer, model: nn.Module, mtp: nn.Module, naming: Naming
) -> None:
    """Vision lessons and all steps of the trunk; checkpoints go to the folder, a resume file to the work folder."""
    resume, finish = args.work / "resume.pt", args.work / "finish"
    step, steps = 0, args.steps
    opt = Optimisers([model, naming], args.rate, args.muon)

    def save() -> None:
        state = {"model": model.state_dict(), "mtp": mtp.state_dict(), "naming": naming.state_dict()}
        state |= {"opt": opt.state_dict(), "step": step, "steps": steps}
        torch.save(state, args.work / "resume.partial")
        os.replace(args.work / "resume.partial", resume)

    if resume.exists():
        state = torch.load(resume)
        for name, part in (("model", model), ("mtp", mtp), ("naming", naming), ("opt", opt)):
            part.load_state_dict(state[name])
        step, steps = state["step"], state["steps"]
        say(f"continuing at step {step}")
    else:
        train_vision(args, model, naming)
        save()
    watch = RouterWatch(model)
    text, visual = [*model.model.language_model.parameters()], [*model.model.visual.parameters(), *naming.parameters()]
    first, started, losses = step, time.perf_counter(), []
    while step < steps:
        if finish.exists() and step < steps - args.decay_steps:
            steps = step + args.decay_steps
            say(f"finishing: the same as --steps {steps}")
        batch = data.training_batch(tokenizer, args.seed, step)
        loss, extra = trunk_loss(model, watch, naming, batch, data.stage_at(step).naming)
        (loss + extra).backward()
        # Apart, since the naming loss moves the vision tower much more than answers move the text model.
        norm = nn.utils.clip_grad_norm_(text, 1.0)
        nn.utils.clip_grad_norm_(visual, 1.0)
        if not math.isfinite(float(norm)):
            raise RuntimeError(f"the gradient is not finite at step {step}")
        opt.step(schedule(step, steps, args.decay_steps))
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            seconds = (time.perf_counter() - started) / (step - first)
            mean = sum(losses) / len(losses)
            say(f"step {step} loss {mean:.4f} extra {extra.item():.3f} norm {norm:.2f} {seconds:.3f} s/step")
            losses = []
        if step % args.save_every == 0 or step == steps:
            package.save_weights(args.folder, model, mtp)
            save()
            quick_check(tokenizer, model, step)
            watch.logits.clear()


@torch.no_grad()
def quick_check(tokenizer: Tokenizer, model: Qwen3_5MoeForConditionalGeneration, step: int) -> None:
    """Prints exact answers on some held-out questions, by kind (evaluate.py does it thoroughly)."""
    rng = random.Random("quick check")
    right: dict[str, list[bool]] = {}
    stage = data.stage_at(step - 1)
    for size in stage.sizes:
        rows, images, kinds = [], [], []
        for kind in sorted(set(stage.kinds)) * 3:
            question = None
            while question is None:
                scene = scenes.make_scene(rng, size, rng.choices((1, 2, 3, 4), stage.things)[0], True)
                question = scenes.ASKERS[kind](scene, rng)
            row = data.Row(tokenizer)
            row.ask(question.text, [size])
            row.answer(question.answer, True)
            rows.append(row)
            images.append(data.picture_pixels(scene, size, rng))
            kinds.append(kind)
        batch = data.collate(rows, [data.patches(images)])
        hidden, _, _ = network.trunk_forward(model, batch.ids, batch.positions, batch.pictures)
        labels = batch.labels[:, 1:]
        same = ((hidden[:, :-1] @ model.lm_head.weight.T).argmax(-1) == labels) | (labels == data.IGNORED)
        for kind, ok in zip(kinds, same.all(1).tolist(), strict=True):
            right.setdefault(kind, []).append(ok)
    total = [ok for oks in right.values() for ok in oks]
    parts = ", ".join(f"{kind} {sum(oks) / len(oks):.2f}" for kind, oks in right.items())
    say(f"check {step}: {sum(total) / len(total):.3f} ({parts})")


def train_draft(args: argparse.Namespace, tokenizer: Tokenizer, model: nn.Module, mtp: nn.Module) -> None:
    """Fits the draft layer to the frozen trunk: row t shall give the trunk's greedy token for t+2."""
    opt = Optimisers([mtp], DRAFT_RATE, args.muon)
    watch = RouterWatch(mtp)
    agreed, losses = [], []
    for step in range(args.draft_steps):
        batch = data.training_batch(tokenizer, args.seed, 1_000_000 + step)
        with torch.no_grad():
            hidden, embeddings, _ = network.trunk_forward(model, batch.ids, batch.positions, batch.pictures)
            learnt = batch.labels[:, 2:] != data.IGNORED
            greedy = F.linear(hidden[:, 1:-1][learnt], model.lm_head.weight).argmax(-1)
        drafts = network.draft_forward(model, mtp, hidden, embeddings, batch.positions)[:, :-1][learnt]
        logits = F.linear(drafts, model.lm_head.weight.detach())
        loss = F.cross_entropy(logits, greedy)
        valid = (torch.arange(batch.ids.shape[1] - 1)[None] < row_lengths(batch)[:, None]).flatten()
        (loss + BALANCE * watch.loss(valid)).backward()
        nn.utils.clip_grad_norm_(mtp.parameters(), 1.0)
        opt.step(schedule(step, args.draft_steps, args.draft_steps - 20, 20))
        losses.append(loss.item())
        agreed.append(float((logits.argmax(-1) == greedy).float().mean()))
        if (step + 1) % 50 == 0:
            mean, share = sum(losses) / len(losses), sum(agreed) / len(agreed)
            say(f"draft step {step + 1} loss {mean:.4f} agrees {share:.3f}")
            losses, agreed = [], []
    package.save_weights(args.folder, model, mtp)


def say(text: str) -> None:
    """Prints at once."""
    print(text, flush=True)


def main() -> None:
    """Trains and writes the folder."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    if not (args.work / "resume.pt").exists():
        tokenizer = package.build_tokenizer()
        package.write_settings(args.folder, tokenizer, package.build_config(tokenizer))
    package.write_pictures(args.folder)
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    model, mtp = network.build(package.build_config(tokenizer))
    network.use_fast_parts()
    naming = Naming(model.config.text_config.hidden_size)
    train_trunk(args, tokenizer, model, mtp, naming)
    model.requires_grad_(False)
    train_draft(args, tokenizer, model, mtp)
    say(f"done in {(time.perf_counter() - started) / 60:.1f} min")


if __name__ == "__main__":
    main()
