"""One step of every kind of case. Each function loads what it needs and returns the step, a function without arguments.

Nothing here is slower than a careful user of PyTorch would write it: gradients are dropped and not zeroed, AdamW is the fused
one, the EMA is one call over all tensors, frozen weights record nothing.
"""

import torch
from torch import nn

import diffusion
import dit
import setting
import tensors

GUIDANCE = 4.0
LR, MASK_LR, CLIP, EMA = 1e-4, 1e-3, 1.0, 0.9999
ALPHA_KD, BETA = 0.9, 1e-2
RANK, ALPHA = 8, 16
SCALE, TAU = 100.0, 1.0


def load_file(path):
    return tensors.load_file(path, device=str(setting.device))


def forward(folder, compiled):
    model, batch = dit.load(folder / "model").eval().to(setting.dtype), load_file(folder / "batch.safetensors")
    run = compiled(model)

    @torch.inference_mode()
    def step():
        return run(batch["x"], batch["t"], batch["y"])[0]  # (B, 2C, H, W)

    return step


def sampling(folder, compiled):
    model, batch = dit.load(folder / "model").eval().to(setting.dtype), load_file(folder / "batch.safetensors")

    def one(x, t, y, noise):
        out = diffusion.guided(model, x, t, y, model.num_classes, GUIDANCE)
        return diffusion.p_sample(out, x, t, noise)

    run = compiled(one)

    @torch.inference_mode()
    def step():
        return run(batch["x"], batch["t"], batch["y"], batch["noise"])  # (B, C, H, W)

    return step


def drop_labels(y, model):
    """Labels become the null class with the model's probability."""
    dropped = torch.rand(y.shape[0], device=y.device) < model.class_dropout_prob
    return torch.where(dropped, model.num_classes, y)


def noised(x):
    """New timesteps and noise, and x_t."""
    t, noise = torch.randint(0, 1000, (x.shape[0],), device=x.device), torch.randn_like(x)
    return t, noise, diffusion.q_sample(x, t, noise)


def trained(groups, ema=()):
    """What follows the loss: backward, clip, AdamW, and the EMA of the parameters in `ema`."""
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.0, fused=True)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    source = [p.detach() for p in ema]
    average = [p.clone() for p in source]

    def update(loss):
        loss.backward()
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average:
            torch._foreach_lerp_(average, source, 1 - EMA)

    return update


def fine_tune(folder, compiled):
    model, batch = dit.load(folder / "model").train(), load_file(folder / "batch.safetensors")
    run = compiled(model)
    update = trained([p for p in model.parameters() if p.requires_grad], ema=list(model.parameters()))

    def step():
        x, y = batch["x"], drop_labels(batch["y"], model)
        t, noise, x_t = noised(x)
        with setting.training():
            out = run(x_t, t, y)[0]
        update(diffusion.loss(out, x, x_t, t, noise).mean())

    return step


def masked_kd(folder, compiled):
    teacher = dit.load(folder / "model").eval().requires_grad_(False).to(setting.dtype)
    model, batch = dit.load(folder / "student").train(), load_file(folder / "batch.safetensors")
    run, teach = compiled(model), compiled(teacher)
    update = trained([p for p in model.parameters() if p.requires_grad], ema=list(model.parameters()))
    # Group ends: block i of the student stands for the blocks 2i and 2i + 1.
    taps = tuple(range(len(model.blocks)))
    teacher_taps = tuple(2 * i + 1 for i in taps)

    def step():
        x, y = batch["x"], drop_labels(batch["y"], model)
        t, noise, x_t = noised(x)
        with torch.no_grad():
            taught, theirs = teach(x_t, t, y, taps=teacher_taps)
        with setting.training():
            out, own = run(x_t, t, y, taps=taps)
        truth = diffusion.loss(out, x, x_t, t, noise).mean()
        distilled = diffusion.distillation_loss(out, taught, x, x_t, t).mean()
        update(ALPHA_KD * distilled + (1 - ALPHA_KD) * truth + BETA * diffusion.feature_loss(own, theirs))

    return step


def sample_masks(logits, batch):
    """One mask per sample, (B, depth) of exact zeros and ones: one block of every two, straight-through."""
    gumbel = -torch.empty(batch, *logits.shape, device=logits.device).exponential_().log()  # (B, groups, 2)
    soft = ((logits * SCALE + gumbel) / TAU).softmax(dim=-1)
    hard = nn.functional.one_hot(soft.argmax(dim=-1), 2).to(soft.dtype)
    # The options of a pair are (1, 0) and (0, 1): the one-hot vector is the mask.
    return (hard + (soft - soft.detach())).flatten(1)


def learn(folder, compiled, low_rank):
    model, batch = dit.load(folder / "model").train(), load_file(folder / "batch.safetensors")
    if low_rank:
        dit.add_lora(model, RANK, ALPHA)
    logits = nn.Parameter(torch.full((len(model.blocks) // 2, 2), 0.02, device=setting.device))
    run = compiled(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    update = trained([{"params": weights}, {"params": [logits], "lr": MASK_LR}])

    def step():
        x, y = batch["x"], drop_labels(batch["y"], model)
        t, noise, x_t = noised(x)
        mask = sample_masks(logits, x.shape[0])
        with setting.training():
            out = run(x_t, t, y, mask=mask)[0]
        update(diffusion.loss(out, x, x_t, t, noise).mean())

    return step


def learn_full(folder, compiled):
    return learn(folder, compiled, low_rank=False)


def learn_lora(folder, compiled):
    return learn(folder, compiled, low_rank=True)


def matmul(_folder, _compiled):
    """The sizes are those of `flops.rs` and, on a GPU, of gpu.py."""
    rows, inputs, outputs = (2048, 1152, 4608) if setting.device.type == "cpu" else (8192, 8192, 8192)
    a, b = (torch.randn(*shape, dtype=setting.dtype, device=setting.device) for shape in ((rows, inputs), (inputs, outputs)))
    c = torch.empty(rows, outputs, dtype=setting.dtype, device=setting.device)

    def step():
        torch.mm(a, b, out=c)

    return step


def copy(_folder, _compiled):
    source = torch.ones(64 * 1024 * 1024, device=setting.device)  # 256 MiB
    target = torch.zeros_like(source)

    def step():
        target.copy_(source)

    return step


KINDS = {
    "forward": forward,
    "sampling": sampling,
    "fine-tune": fine_tune,
    "masked-kd": masked_kd,
    "learn-full": learn_full,
    "learn-lora": learn_lora,
    "matmul": matmul,
    "copy": copy,
}
