# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Golden reference of the MAE and CL-MAE losses: the formulas written out one image, patch and pair at a time.

Only for tests, on tiny models: slow, in float64, and without any part of `clmae.modeling`. Parameters come as a plain
`dict[str, Tensor]` in float64, a `state_dict()` under the names of transformers' ViTMAE (and `masking_module.…`);
a missing name is a `KeyError`, a float32 parameter a `RuntimeError` at the first matrix product. GELU whatever
`config.hidden_act` says; no dropout or drop path.

Mask convention: 1 = masked, 0 = visible. B images, N patches of P = p_h * p_w * C pixel values, widths D and D_dec.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]

MASKER = "masking_module."
FIXED = ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed")  # sin-cos, never trained
TERMS = ("soft_reconstruction_loss", "gauss_loss", "kl_loss", "diversity_loss")
NORM_PIX_EPS = 1e-6


# -- geometry ---------------------------------------------------------------------------------------------------


def sincos_positions(width: int, h: int, w: int) -> Tensor:
    """Fixed 2-D positions `(h * w + 1, width)`: `[sin(x) | cos(x) | sin(y) | cos(y)]`, x the column, y the row.

    Row 0 is the class token's zero vector; then the patches, row by row.
    """
    quarter = width // 4
    positions = torch.zeros(h * w + 1, width, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            for i in range(quarter):
                frequency = 10000.0 ** (-i / quarter)
                row = positions[1 + y * w + x]
                row[i] = math.sin(x * frequency)
                row[quarter + i] = math.cos(x * frequency)
                row[2 * quarter + i] = math.sin(y * frequency)
                row[3 * quarter + i] = math.cos(y * frequency)
    return positions


def patch_pixels(config: Any, image: Tensor) -> Tensor:
    """Patches `(N, P)` of one image `(C, H, W)`: row-major over the grid, in each patch (row, column, channel)."""
    channels, height, width = image.shape
    patch_height, patch_width = _two(config.patch_size)
    patches = []
    for top in range(0, height, patch_height):
        for left in range(0, width, patch_width):
            pixels = []
            for y in range(patch_height):
                for x in range(patch_width):
                    for channel in range(channels):
                        pixels.append(image[channel, top + y, left + x])
            patches.append(torch.stack(pixels))
    return torch.stack(patches)


def target_pixels(config: Any, image: Tensor) -> Tensor:
    """What is reconstructed, `(N, P)`: the patches, with `norm_pix_loss` each by its own mean and unbiased variance."""
    targets = []
    for patch in patch_pixels(config, image):
        if config.norm_pix_loss:
            mean = patch.sum() / len(patch)
            variance = ((patch - mean) ** 2).sum() / (len(patch) - 1)
            patch = (patch - mean) / torch.sqrt(variance + NORM_PIX_EPS)
        targets.append(patch)
    return torch.stack(targets)


def num_visible(config: Any) -> int:
    """K = int(N * (1 - r))."""
    (height, width), (patch_height, patch_width) = _two(config.image_size), _two(config.patch_size)
    return int((height // patch_height) * (width // patch_width) * (1 - config.mask_ratio))


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


# -- the transformer, on one sequence (T, D) ----------------------------------------------------------------------


def _linear(params: Params, name: str, x: Tensor, bias: bool = True) -> Tensor:
    y = x @ params[f"{name}.weight"].T
    return y + params[f"{name}.bias"] if bias else y


def _layer_norm(params: Params, name: str, x: Tensor, eps: float) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * params[f"{name}.weight"] + params[f"{name}.bias"]


def _attention(
    params: Params, name: str, x: Tensor, heads: int, qkv_bias: bool, shares: Tensor | None = None
) -> Tensor:
    """`shares` `(T,)`: each token's softmax weights are multiplied by its share, and made to sum to 1 again."""
    q, k, v = (_linear(params, f"{name}.{part}_proj", x, qkv_bias) for part in "qkv")
    head_width = x.shape[1] // heads
    outputs = []
    for head in range(heads):
        columns = slice(head * head_width, (head + 1) * head_width)
        scores = q[:, columns] @ k[:, columns].T / math.sqrt(head_width)
        weights = torch.softmax(scores, dim=1)
        if shares is not None:
            weights = weights * shares[None, :]
            weights = weights / weights.sum(dim=1, keepdim=True)
        outputs.append(weights @ v[:, columns])
    return _linear(params, f"{name}.o_proj", torch.cat(outputs, dim=1))


def _block(
    params: Params, name: str, x: Tensor, heads: int, eps: float, config: Any, shares: Tensor | None = None
) -> Tensor:
    normed = _layer_norm(params, f"{name}.layernorm_before", x, eps)
    x = x + _attention(params, f"{name}.attention", normed, heads, config.qkv_bias, shares)
    hidden = _linear(params, f"{name}.mlp.fc1", _layer_norm(params, f"{name}.layernorm_after", x, eps))
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2  # exact GELU
    return x + _linear(params, f"{name}.mlp.fc2", hidden)


def _patch_tokens(params: Params, config: Any, image: Tensor) -> Tensor:
    """Patch embeddings with their positions added, `(N, D)`, of one image."""
    weight = params["vit.embeddings.patch_embeddings.projection.weight"]  # (D, C, p_h, p_w)
    bias = params["vit.embeddings.patch_embeddings.projection.bias"]
    position = params["vit.embeddings.position_embeddings"][0]
    patch_height, patch_width = _two(config.patch_size)
    tokens = []
    for top in range(0, image.shape[1], patch_height):
        for left in range(0, image.shape[2], patch_width):
            patch = image[:, top : top + patch_height, left : left + patch_width]
            tokens.append((weight * patch).sum(dim=(1, 2, 3)) + bias + position[1 + len(tokens)])
    return torch.stack(tokens)


def _encode(params: Params, config: Any, tokens: Tensor, shares: Tensor | None = None) -> Tensor:
    """Class token in front, encoder blocks, final LayerNorm: `(T, D)` -> `(1 + T, D)`; `shares` of all 1 + T."""
    first = params["vit.embeddings.cls_token"][0, 0] + params["vit.embeddings.position_embeddings"][0, 0]
    x = torch.cat([first[None], tokens])
    for i in range(config.num_hidden_layers):
        x = _block(params, f"vit.layers.{i}", x, config.num_attention_heads, config.layer_norm_eps, config, shares)
    return _layer_norm(params, "vit.layernorm", x, config.layer_norm_eps)


def _decode(params: Params, config: Any, x: Tensor) -> Tensor:
    """From the class token's and N patch tokens `(1 + N, D_dec)` in the order of the grid to pixels `(N, P)`."""
    x = x + params["decoder.decoder_pos_embed"][0]
    heads, eps = config.decoder_num_attention_heads, config.layer_norm_eps
    for i in range(config.decoder_num_hidden_layers):
        x = _block(params, f"decoder.decoder_layers.{i}", x, heads, eps, config)
    x = _layer_norm(params, "decoder.decoder_norm", x, eps)
    return _linear(params, "decoder.decoder_pred", x)[1:]


# -- the autoencoder ----------------------------------------------------------------------------------------------


def mae_forward(params: Params, config: Any, pixel_values: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """MAE: per image the K patches with the smallest noise are visible.

    Args:
        params: Float64 parameters.
        config: An `MAEConfig` or anything with its fields; image and patch size as one number or two.
        pixel_values: `(B, C, H, W)`.
        noise: `(B, N)`, without ties.

    Returns:
        `loss` `()`, `logits` `(B, N, P)`, `mask` `(B, N)` float64, `ids_restore` `(B, N)` int64 (the rank of each
        patch's noise), `patch_errors` `(B, N)` (mean squared error of every patch, visible ones too).
    """
    pixel_values = pixel_values.double()
    visible_count = num_visible(config)
    logits, masks, ranks, errors = [], [], [], []
    for image, image_noise in zip(pixel_values, noise.tolist(), strict=True):
        order = sorted(range(len(image_noise)), key=lambda patch: image_noise[patch])
        rank = [order.index(patch) for patch in range(len(order))]
        visible = [patch for patch in range(len(order)) if rank[patch] < visible_count]
        tokens = _patch_tokens(params, config, image)
        encoded = _encode(params, config, tokens[visible])
        embedded = _linear(params, "decoder.decoder_embed", encoded)
        full = [embedded[0]]
        for patch in range(len(order)):
            is_visible = patch in visible
            full.append(embedded[1 + visible.index(patch)] if is_visible else params["decoder.mask_token"][0, 0])
        logits.append(_decode(params, config, torch.stack(full)))
        errors.append(_patch_errors(config, logits[-1], image))
        masks.append([0.0 if patch in visible else 1.0 for patch in range(len(order))])
        ranks.append(rank)
    patch_errors, mask = torch.stack(errors), torch.tensor(masks, dtype=torch.float64)
    return {
        "loss": _weighted_mean(patch_errors, mask),
        "logits": torch.stack(logits),
        "mask": mask,
        "ids_restore": torch.tensor(ranks),
        "patch_errors": patch_errors,
    }


def _patch_errors(config: Any, logits: Tensor, image: Tensor) -> Tensor:
    """Mean squared error `(N,)` of each patch of one image."""
    errors = []
    for prediction, target in zip(logits, target_pixels(config, image), strict=True):
        errors.append(((prediction - target) ** 2).sum() / len(target))
    return torch.stack(errors)


def _weighted_mean(errors: Tensor, weights: Tensor) -> Tensor:
    """`Σ weight * error / Σ weight` over images and patches."""
    numerator, denominator = 0.0, 0.0
    for image in range(errors.shape[0]):
        for patch in range(errors.shape[1]):
            numerator = numerator + weights[image, patch] * errors[image, patch]
            denominator = denominator + weights[image, patch]
    return numerator / denominator


# -- CL-MAE -------------------------------------------------------------------------------------------------------


def keep_probabilities(params: Params, config: Any, pixel_values: Tensor) -> Tensor:
    """The masking module's m `(B, N)` in (0, 1): the probability that a patch stays visible.

    Differentiable in every parameter it uses, the patch embedding included; who separates the updates detaches that.
    """
    eps = config.masker_layer_norm_eps
    rows = []
    for image in pixel_values.double():
        tokens = _patch_tokens(params, config, image)
        x = torch.cat([params["masking_module.cls_token"][0], tokens])
        for i in range(config.masker_num_hidden_layers):
            x = _block(params, f"masking_module.layers.{i}", x, config.masker_num_attention_heads, eps, config)
        normed = _layer_norm(params, "masking_module.layernorm", x[0], eps)
        rows.append(torch.sigmoid(_linear(params, "masking_module.head", normed)))
    return torch.stack(rows)


def pass_a(params: Params, config: Any, pixel_values: Tensor, m: Tensor) -> dict[str, Tensor]:
    """The autoencoder's pass: the K patches with the largest m `(B, N)` are visible, then plain MAE.

    Returns what `mae_forward` returns; its `loss` is L_rec, and no gradient reaches m.
    """
    return mae_forward(params, config, pixel_values, -m.detach())


def pass_b(params: Params, config: Any, pixel_values: Tensor, m: Tensor) -> dict[str, Tensor]:
    """The masking module's pass, by `config.soft_masking`; errors are weighted by 1 - m.

    `"tokens"`: every token enters, scaled by its m, and the decoder gets no mask tokens. `"attention"`: every token
    enters as it is, but is attended to m (+ 1e-8) times as much, the class token fully; the decoder gets a mixture of m
    parts of what was encoded and 1 - m parts of the mask token.

    Returns:
        `loss` `()` (L_soft), `logits` `(B, N, P)`, `patch_errors` `(B, N)`; all differentiable in m `(B, N)`.
    """
    logits, errors = [], []
    for image, image_m in zip(pixel_values.double(), m, strict=True):
        tokens = _patch_tokens(params, config, image)
        if config.soft_masking == "tokens":
            scaled = torch.stack([token * keep for token, keep in zip(tokens, image_m, strict=True)])
            embedded = _linear(params, "decoder.decoder_embed", _encode(params, config, scaled))
        else:
            shares = torch.cat([torch.ones(1, dtype=torch.float64), image_m + 1e-8])
            embedded = _linear(params, "decoder.decoder_embed", _encode(params, config, tokens, shares))
            mask_token, mixture = params["decoder.mask_token"][0, 0], [embedded[0]]
            for token, keep in zip(embedded[1:], image_m, strict=True):
                mixture.append(token * keep + mask_token * (1 - keep))
            embedded = torch.stack(mixture)
        logits.append(_decode(params, config, embedded))
        errors.append(_patch_errors(config, logits[-1], image))
    patch_errors = torch.stack(errors)
    return {"loss": _weighted_mean(patch_errors, 1 - m), "logits": torch.stack(logits), "patch_errors": patch_errors}


def pass_b_soft_loss(params: Params, config: Any, pixel_values: Tensor, m: Tensor) -> Tensor:
    """L_soft = Σ (1 - m_i) e_i / Σ (1 - m_i) over images and patches, `()`."""
    return pass_b(params, config, pixel_values, m)["loss"]


def gauss_loss(m: Tensor, sigma: float) -> Tensor:
    """L_gauss = mean over `(B, N)` of sigma sqrt(2 pi) exp(-(m - 1/2)² / (2 sigma²))."""
    total = m.new_zeros(())
    for row in m:
        for value in row:
            total = total + sigma * math.sqrt(2 * math.pi) * torch.exp(-((value - 0.5) ** 2) / (2 * sigma**2))
    return total / m.numel()


def kl_loss(m: Tensor, mask_ratio: float, reduction: str = "mean") -> Tensor:
    """L_kl = KL(Bernoulli(mean of m over an image's patches) || Bernoulli(1 - r)), mean or sum over images."""
    keep = 1 - mask_ratio
    total = m.new_zeros(())
    for row in m:
        mean = m.new_zeros(())
        for value in row:
            mean = mean + value / len(row)
        total = total + mean * torch.log(mean / keep) + (1 - mean) * torch.log((1 - mean) / (1 - keep))
    return {"mean": total / len(m), "sum": total}[reduction]


def diversity_loss(m: Tensor, scale: float) -> Tensor:
    """L_div = mean over pairs i < j of exp(-scale * ||m_i - m_j||₂); 0 for one image.

    Two equal images have no derivative of the distance; its subgradient 0 is taken.
    """
    total, pairs = m.new_zeros(()), 0
    for i in range(len(m)):
        for j in range(i + 1, len(m)):
            total = total + torch.exp(-scale * torch.linalg.vector_norm(m[i] - m[j]))
            pairs += 1
    return total / pairs if pairs else total


def curriculum_factor(step: int, total_steps: int, shape: str, start: float, end: float) -> float:
    """λ_CL at a step from 0 to `total_steps - 1`: `"linear"` or `"cosine"` from start to end, or `"constant"`.

    A run of one step has only the start.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"`step` is {step}; give one from 0 to {total_steps - 1}.")
    time = step / (total_steps - 1) if total_steps > 1 else 0.0
    way = {"linear": time, "cosine": (1 - math.cos(math.pi * time)) / 2, "constant": 0.0}[shape]
    return (1 - way) * start + way * end


def cl_mae_gradients(params: Params, config: Any, pixel_values: Tensor, curriculum_factor: float) -> dict[str, Any]:
    """All losses of CL-MAE and the gradients of one joint update.

    Args:
        params: Float64 parameters; every name but the fixed positions must take part in a loss.
        config: A `CLMAEConfig`.
        pixel_values: `(B, C, H, W)`.
        curriculum_factor: λ_CL.

    Returns:
        Scalars before their weights: `reconstruction_loss`, `soft_reconstruction_loss`, `gauss_loss`, `kl_loss`,
        `diversity_loss`; `masking_loss` (the weighted sum L_mask) and `loss` (L_rec + L_mask). Of pass A: `logits`,
        `mask`, `ids_restore`, `patch_errors`; `keep_probabilities` `(B, N)`; of pass B: `soft_patch_errors`.
        `grads`: name -> gradient; dL_rec/dθ for embeddings, encoder and decoder, dL_mask/dθ for the masking module;
        the fixed positions have none. `term_grads`: term -> name -> gradient of the unweighted term at the masking
        module's parameters, terms as in `TERMS`.
    """
    fixed = {name: value.detach() for name, value in params.items()}
    names = [name for name in params if name not in FIXED]
    masker = {name: fixed[name].clone().requires_grad_() for name in names if name.startswith(MASKER)}
    backbone = {name: fixed[name].clone().requires_grad_() for name in names if not name.startswith(MASKER)}

    m = keep_probabilities({**fixed, **masker}, config, pixel_values)
    reconstruction = pass_a({**fixed, **backbone}, config, pixel_values, m.detach())
    soft = pass_b(fixed, config, pixel_values, m)
    terms = {
        "soft_reconstruction_loss": soft["loss"],
        "gauss_loss": gauss_loss(m, config.gauss_sigma),
        "kl_loss": kl_loss(m, config.mask_ratio, config.kl_reduction),
        "diversity_loss": diversity_loss(m, config.diversity_scale),
    }
    weights = {
        "soft_reconstruction_loss": curriculum_factor,
        "gauss_loss": config.gauss_loss_weight,
        "kl_loss": config.kl_loss_weight,
        "diversity_loss": config.diversity_loss_weight,
    }
    masking_loss = sum(weights[term] * terms[term] for term in TERMS)
    values = {
        "reconstruction_loss": reconstruction["loss"],
        **terms,
        "masking_loss": masking_loss,
        "loss": reconstruction["loss"] + masking_loss,
        "keep_probabilities": m,
        "soft_patch_errors": soft["patch_errors"],
        **{name: reconstruction[name] for name in ("logits", "mask", "ids_restore", "patch_errors")},
    }
    return {
        **{name: value.detach() for name, value in values.items()},
        "grads": {**_gradients(reconstruction["loss"], backbone), **_gradients(masking_loss, masker)},
        "term_grads": {term: _gradients(terms[term], masker) for term in TERMS},
    }


def _gradients(loss: Tensor, leaves: Params) -> Params:
    if not loss.requires_grad:  # the diversity of a single image is a constant
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    return dict(zip(leaves, gradients, strict=True))


# -- CMAE ---------------------------------------------------------------------------------------------------------


def contrastive_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE of `(B, d)` and `(B, d)`: each row has to be found among all rows of the other, both ways."""
    cosines = [[(a @ b) / (a.norm() * b.norm()) / temperature for b in second] for a in first]
    total = first.new_zeros(())
    for i in range(len(first)):
        forth = torch.stack([cosines[i][j] for j in range(len(second))])
        back = torch.stack([cosines[j][i] for j in range(len(first))])
        total = total - (cosines[i][i] - torch.logsumexp(forth, 0)) - (cosines[i][i] - torch.logsumexp(back, 0))
    return total / (2 * len(first))


def cmae_gradients(params: Params, config: Any, pixel_values: Tensor, noise: Tensor) -> dict[str, Any]:
    """All losses of CMAE under random masks, and their gradients.

    Args:
        params: Float64 parameters; every name but the fixed positions must take part in a loss.
        config: A `CMAEConfig` whose weights are not 0.
        pixel_values: `(B, 2, C, H, W)`.
        noise: `(B, 2, N)`, without ties; of a view's K visible patches, the `int(K * position_mask_ratio)` with the
            smallest fractional part of `noise * 4096` lose their position.

    Returns:
        `reconstruction_loss` (mean of the two views'), `contrastive_loss`, `position_loss`, `position_accuracy`,
        `loss`, `projections` `(B, 2, d)`, `mask` `(B, 2, N)`; `grads`: name -> gradient of `loss`.
    """
    leaves = {name: v.detach().clone().requires_grad_() for name, v in params.items() if name not in FIXED}
    params = {**params, **leaves}
    count = num_visible(config)
    errors, masks, projections, losses, hits = [], [], [], [], []
    for image_views, image_noise in zip(pixel_values.double(), noise.tolist(), strict=True):
        for image, view_noise in zip(image_views, image_noise, strict=True):
            patches = range(len(view_noise))
            visible = sorted(patches, key=lambda patch: view_noise[patch])[:count]
            fractions = {patch: math.modf(view_noise[patch] * 4096)[0] for patch in visible}
            lost = sorted(visible, key=lambda patch: fractions[patch])[: int(count * config.position_mask_ratio)]
            tokens = _patch_tokens(params, config, image)
            seen = []
            for patch in visible:
                token = tokens[patch]
                if patch in lost:
                    token = token - params["vit.embeddings.position_embeddings"][0, 1 + patch]
                    token = token + params["position_head.mask_token"][0, 0]
                seen.append(token)
            encoded = _encode(params, config, torch.stack(seen))
            embedded = _linear(params, "decoder.decoder_embed", encoded)
            full = [embedded[0]]
            for patch in patches:
                full.append(
                    embedded[1 + visible.index(patch)] if patch in visible else params["decoder.mask_token"][0, 0]
                )
            errors.append(_patch_errors(config, _decode(params, config, torch.stack(full)), image))
            masks.append(torch.tensor([float(patch not in visible) for patch in patches], dtype=torch.float64))
            mean = sum(encoded[1 + k] for k in range(count)) / count
            hidden = _linear(params, "projector.fc1", mean)
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            projections.append(_linear(params, "projector.fc2", hidden))
            for patch in lost:
                scores = _linear(params, "position_head.classifier", encoded[1 + visible.index(patch)])
                losses.append(torch.logsumexp(scores, 0) - scores[patch])
                hits.append(float(scores.argmax().item() == patch))
    projected = torch.stack(projections).unflatten(0, (-1, 2))
    terms = {
        "reconstruction_loss": _weighted_mean(torch.stack(errors), torch.stack(masks)),
        "contrastive_loss": contrastive_loss(projected[:, 0], projected[:, 1], config.contrastive_temperature),
        "position_loss": sum(losses) / len(losses),
    }
    loss = (
        terms["reconstruction_loss"]
        + config.contrastive_loss_weight * terms["contrastive_loss"]
        + config.position_loss_weight * terms["position_loss"]
    )
    grads = _gradients(loss, leaves)
    values = {**terms, "loss": loss, "projections": projected}
    return {
        **{name: value.detach() for name, value in values.items()},
        "position_accuracy": sum(hits) / len(hits),
        "mask": torch.stack(masks).unflatten(0, (-1, 2)),
        "grads": grads,
    }
