"""Trains the bundled miniature from nothing and writes its folder: `python bench/miniature/train.py`.

Needs torch and transformers. Seeds fix weights and batches. The learning rate warms up, stays, and falls
to zero over the last steps; then the trunk is frozen and the draft (MTP) layer learns the trunk's own greedy tokens.
Creating the file `finish` beside the resume file starts the fall at once (the log then names the equal `--steps`).
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
import network
import package
import scenes
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3_5MoeForConditionalGeneration
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter

WARM_UP = 200
BALANCE = 0.01
DRAFT_RATE = 3e-3
LESSONS = ((0, 600), (1000, 2000))  # trunk step before which the vision tower learns alone, and for how many steps


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=package.FOLDER, help="where the miniature is written")
    parser.add_argument("--steps", type=int, default=6800, help="steps of the trunk, the falling ones included")
    parser.add_argument("--decay-steps", type=int, default=1500, help="steps over which the learning rate falls")
    parser.add_argument("--draft-steps", type=int, default=300, help="steps of the draft layer after the trunk's")
    parser.add_argument("--rate", type=float, default=1.2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread that share a step's rows")
    parser.add_argument("--save-every", type=int, default=500)
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
        """Mean over layers since the last call; `valid` [B*T] leaves padding out."""
        total = torch.zeros(())
        for logits in self.logits:
            p = logits[valid].softmax(-1)
            chosen = torch.zeros_like(p).scatter_(1, p.topk(2, dim=-1).indices, 0.5)
            total = total + p.shape[1] * (chosen.mean(0) * p.mean(0)).sum()
        total = total / max(len(self.logits), 1)
        self.logits.clear()
        return total


def optimiser(modules: list[nn.Module], rate: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors do not."""
    matrices = [p for m in modules for p in m.parameters() if p.ndim >= 2]
    vectors = [p for m in modules for p in m.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def learning_rate(step: int, steps: int, decay_steps: int, highest: float, warm_up: int = WARM_UP) -> float:
    """Linear warm-up, constant, then half a cosine down to a hundredth."""
    if step < warm_up:
        return highest * (step + 1) / warm_up
    done = (step - (steps - decay_steps)) / max(decay_steps, 1)
    return highest if done <= 0 else highest * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


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


def train_vision(
    args: argparse.Namespace, model: Qwen3_5MoeForConditionalGeneration, naming: Naming, name: str, steps: int
) -> None:
    """Lessons for the vision tower alone: features from which a linear map can name things."""
    modules = [model.model.visual, naming]
    parameters = [p for m in modules for p in m.parameters()]
    opt = optimiser(modules, args.rate)
    shown = []
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, steps, steps // 2, args.rate)
        rng = random.Random(f"{args.seed}/vision {name} {step}/{dist.get_rank()}")
        pixels, grid, targets = data.lesson_batch(rng, 32 // args.workers)
        features = network.vision_forward(model.model.visual, pixels, grid)
        loss = naming(features, targets)
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        shown.append(loss.item())
        if (step + 1) % 100 == 0:
            right = naming.right(features.detach(), targets)
            say(f"vision step {step + 1} right {right} loss {sum(shown) / len(shown):.4f}")
            shown = []


def trunk_loss(
    model: Qwen3_5MoeForConditionalGeneration, watch: RouterWatch, naming: Naming, batch: data.Batch, weight: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the learnt tokens; load-balancing and naming losses, weighted."""
    hidden, _, features = network.trunk_forward(model, batch.ids, batch.positions, batch.pictures)
    learnt = batch.labels[:, 1:] != data.IGNORED
    logits = model.lm_head(hidden[:, :-1][learnt])
    valid = (torch.arange(batch.ids.shape[1])[None] < row_lengths(batch)[:, None]).flatten()
    extra = BALANCE * watch.loss(valid)
    if features is not None and batch.targets is not None:
        extra = extra + weight * naming(features, batch.targets)
    return F.cross_entropy(logits, batch.labels[:, 1:][learnt]), extra


def row_lengths(batch: data.Batch) -> Tensor:
    """Tokens before the padding, per row (padding has id 0 and position 0)."""
    index = torch.arange(batch.ids.shape[1])
    used = (batch.positions[0] > 0) | (batch.ids > 0)
    return torch.where(used, index, 0).max(1).values + 1


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replaces every gradient by its mean over the workers."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


def train_trunk(
    args: argparse.Namespace, tokenizer: Tokenizer, model: nn.Module, mtp: nn.Module, naming: Naming
) -> None:
    """Vision lessons and all steps of the trunk; checkpoints go to the folder, a resume file to the work folder."""
    worker = dist.get_rank()
    opt = optimiser([model, naming], args.rate)
    parameters = [*model.parameters(), *naming.parameters()]
    watch = RouterWatch(model)
    resume, finish = args.work / "resume.pt", args.work / "finish"
    first, steps, lessons = 0, args.steps, 0
    if resume.exists():
        state = torch.load(resume)
        model.load_state_dict(state["model"])
        mtp.load_state_dict(state["mtp"])
        naming.load_state_dict(state["naming"])
        opt.load_state_dict(state["opt"])
        first = state["step"]
        say(f"continuing at step {first}")
        lessons = state["lessons"]
    started, shown, step = time.perf_counter(), [], first

    def save() -> None:
        state = {"model": model.state_dict(), "mtp": mtp.state_dict(), "naming": naming.state_dict()}
        state |= {"opt": opt.state_dict(), "step": step, "lessons": lessons}
        torch.save(state, args.work / "resume.partial")
        os.replace(args.work / "resume.partial", resume)

    while step < steps:
        if lessons < len(LESSONS) and step == LESSONS[lessons][0]:
            train_vision(args, model, naming, str(lessons), LESSONS[lessons][1])
            lessons += 1
            if worker == 0:
                save()
        if step >= data.LAST_STAGE:
            model.model.visual.requires_grad_(False)
        if step % 50 == 0 and step < steps - args.decay_steps:
            stop = torch.tensor(int(finish.exists()))
            dist.broadcast(stop, 0)
            if stop:
                steps = step + args.decay_steps
                say(f"finishing: the same as --steps {steps}")
        rate = learning_rate(step, steps, args.decay_steps, args.rate)
        for group in opt.param_groups:
            group["lr"] = rate
        batch = data.training_batch(tokenizer, args.seed, step, worker, args.workers)
        loss, extra = trunk_loss(model, watch, naming, batch, data.stage_at(step).naming)
        (loss + extra).backward()
        average_gradients(parameters)
        # Apart, since the naming loss moves the vision tower much more than answers move the text model.
        norm = nn.utils.clip_grad_norm_([*model.model.language_model.parameters()], 1.0)
        nn.utils.clip_grad_norm_([*model.model.visual.parameters(), *naming.parameters()], 1.0)
        if not math.isfinite(float(norm)):
            raise RuntimeError(f"the gradient is not finite at step {step}")
        opt.step()
        opt.zero_grad(set_to_none=True)
        shown.append(loss.item())
        step += 1
        if step % 50 == 0:
            seconds = (time.perf_counter() - started) / (step - first)
            mean = sum(shown) / len(shown)
            say(f"step {step} loss {mean:.4f} extra {extra.item():.3f} norm {norm:.2f} {seconds:.3f} s/step")
            shown = []
        if worker == 0 and (step % args.save_every == 0 or step == steps):
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
    opt = optimiser([mtp], DRAFT_RATE)
    watch = RouterWatch(mtp)
    agreed, losses = [], []
    for step in range(args.draft_steps):
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, args.draft_steps, args.draft_steps - 20, DRAFT_RATE, 20)
        batch = data.training_batch(tokenizer, args.seed, 1_000_000 + step, dist.get_rank(), args.workers)
        with torch.no_grad():
            hidden, embeddings, _ = network.trunk_forward(model, batch.ids, batch.positions, batch.pictures)
            learnt = batch.labels[:, 2:] != data.IGNORED
            greedy = model.lm_head(hidden[:, 1:-1][learnt]).argmax(-1)
        drafts = network.draft_forward(model, mtp, hidden, embeddings, batch.positions)[:, :-1][learnt]
        logits = F.linear(drafts, model.lm_head.weight.detach())
        loss = F.cross_entropy(logits, greedy)
        valid = (torch.arange(batch.ids.shape[1] - 1)[None] < row_lengths(batch)[:, None]).flatten()
        (loss + BALANCE * watch.loss(valid)).backward()
        average_gradients(list(mtp.parameters()))
        nn.utils.clip_grad_norm_(mtp.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        losses.append(loss.item())
        agreed.append(float((logits.argmax(-1) == greedy).float().mean()))
        if (step + 1) % 50 == 0:
            mean, share = sum(losses) / len(losses), sum(agreed) / len(agreed)
            say(f"draft step {step + 1} loss {mean:.4f} agrees {share:.3f}")
            losses, agreed = [], []
    if dist.get_rank() == 0:
        package.save_weights(args.folder, model, mtp)


def say(text: str) -> None:
    """Prints from the first worker."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def work(worker: int, args: argparse.Namespace) -> None:
    """One worker's life. All hold the same weights; each computes the gradient of its rows."""
    dist.init_process_group("gloo", f"file://{args.work.resolve()}/meeting", rank=worker, world_size=args.workers)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    config = package.build_config(tokenizer)
    model, mtp = network.build(config)
    network.use_fast_parts()
    started = time.perf_counter()
    naming = Naming(model.config.text_config.hidden_size)
    train_trunk(args, tokenizer, model, mtp, naming)
    model.requires_grad_(False)
    train_draft(args, tokenizer, model, mtp)
    say(f"done in {(time.perf_counter() - started) / 60:.1f} min")
    dist.destroy_process_group()


def main() -> None:
    """Trains and writes the folder."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "meeting").unlink(missing_ok=True)
    if not (args.work / "resume.pt").exists():
        tokenizer = package.build_tokenizer()
        package.write_settings(args.folder, tokenizer, package.build_config(tokenizer))
    package.write_pictures(args.folder)
    torch.multiprocessing.spawn(work, (args,), nprocs=args.workers)


if __name__ == "__main__":
    main()
