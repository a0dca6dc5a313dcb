"""The NeCo objective against its definition, written here view by view; references, queue, masks, controls."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from neco_bench.core.distributed import RankShard
from neco_bench.core.errors import UsageError
from neco_bench.features.attention import foreground
from neco_bench.training.batches import by_view
from neco_bench.training.loss import neco_loss
from neco_bench.training.mim import MaskedImages
from neco_bench.training.neco import NeCo, patches_read
from neco_bench.training.networks import Network
from neco_bench.training.recipe import Recipe

from .helpers import batch, recipe, small_encoder


def networks(settings: Recipe) -> tuple[Network, Network]:
    return Network(small_encoder(), settings, 1).eval(), Network(small_encoder(), settings, 2).eval()


def embed_all(network: Network, images: torch.Tensor) -> torch.Tensor:
    features = network.encoder._encode(images, final_norm=True, attention=False).map
    return F.normalize(network.projection_head(features.permute(0, 2, 3, 1)), dim=-1).permute(0, 3, 1, 2)


def pool(maps: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """(B, 49, E) of one box (4,) per image."""
    aligned = torchvision.ops.roi_align(maps, list(boxes[:, None] / 16), 7, aligned=True)
    return aligned.flatten(2).transpose(1, 2)


def by_definition(objective: NeCo, student: Network, teacher: Network, shard: RankShard, similarity: str) -> float:
    """protocols/neco.md 1.1: every pair (c, v) by itself, references taken from the objective's own draw."""
    made = batch(shard.images)
    views = [made.global_views[:, 0], made.global_views[:, 1], *made.local_views.unbind(1)]
    total = 0.0
    for c in range(2):
        target_map = embed_all(teacher, views[c])
        others = [v for v in range(6) if v != c]
        aligned = torch.stack([pool(target_map, made.gc[:, c, v]) for v in others])
        references = objective._references(aligned, torch.ones(aligned.shape[:-1]), c, shard)
        for pair, v in enumerate(others):
            predicted = pool(embed_all(student, views[v]), made.all[:, v, c])
            sims = []
            for vectors in (predicted, aligned[pair]):
                rows = []
                for image in range(shard.images):
                    for cell in vectors[image]:
                        if similarity == "cosine":
                            rows.append(F.cosine_similarity(cell[None], references[pair, image], dim=1))
                        else:
                            rows.append((cell[None] - references[pair, image]).norm(dim=1))
                sims.append(torch.stack(rows))
            total += float(neco_loss(*sims)) / 5 / 2
    return total


@pytest.mark.slow
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_loss_is_the_definition(similarity: str) -> None:
    settings = recipe(similarity=similarity)
    student, teacher = networks(settings)
    shard, objective = RankShard(0, 3), NeCo(settings, student)
    loss = float(objective(batch(3), student, teacher, teacher, shard))
    assert loss == pytest.approx(by_definition(objective, student, teacher, shard, similarity), rel=1e-5)


def test_gradient_reaches_the_student_alone_and_every_part_of_it() -> None:
    settings = recipe()
    student, teacher = (n.requires_grad_() for n in networks(settings))
    objective = NeCo(settings, student)
    objective(batch(2), student, teacher, teacher, RankShard(0, 2)).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.projection_head.parameters())


def test_without_a_teacher_the_references_carry_gradient_and_the_targets_none() -> None:
    settings = recipe(use_teacher=False)
    student, _ = networks(settings)
    student.requires_grad_()
    objective = NeCo(settings, student)
    loss = objective(batch(2), student, None, student, RankShard(0, 2))
    same = objective(batch(2), student, student, student, RankShard(0, 2))
    assert float(loss.detach()) == pytest.approx(float(same.detach()), rel=1e-6)
    grads = [torch.autograd.grad(value, list(student.projection_head.parameters())) for value in (loss, same)]
    assert not torch.allclose(grads[0][0], grads[1][0], rtol=1e-3, atol=0)


def test_only_patches_that_are_read_matter() -> None:
    """Embeddings elsewhere may be anything: ROI-align of boxes in a map whose other patches are NaN is finite."""
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 112, (200, 2, 2)), axis=1)
    boxes = torch.from_numpy(corners.reshape(200, 1, 4)).float()
    read = patches_read(boxes, 16, 7)
    maps = torch.full((200, 1, 7, 7), torch.nan).masked_fill(read[:, None], 1.0)
    pooled = torchvision.ops.roi_align(maps, list(boxes / 16), 7, aligned=True)
    assert torch.isfinite(pooled).all()
    assert read.float().mean() < 0.6


def test_in_batch_references_use_every_teacher_vector_once() -> None:
    objective, shard = NeCo(recipe(), Network(small_encoder(), recipe(), 0)), RankShard(5, 4)
    aligned = torch.arange(5 * 4 * 49.0).view(5, 4, 49, 1).expand(-1, -1, -1, 16)
    references = objective._references(aligned, torch.ones(5, 4, 49), 0, shard)
    assert references.shape == (5, 4, 49, 16)
    for pair in range(5):
        assert torch.equal(references[pair, ..., 0].flatten().sort().values, aligned[pair, ..., 0].flatten())
    own = (references[..., 0] // 49 % 4 == torch.arange(4)[None, :, None]).float().mean()
    assert 0.15 < own < 0.35  # one in B on average
    shard.batch_number = 1
    assert not torch.equal(objective._references(aligned, torch.ones(5, 4, 49), 0, shard), references)


def test_references_of_an_accumulated_part_are_its_own() -> None:
    """What recipes say of `accumulate`: two parts of two images are not a batch of four."""
    objective = NeCo(recipe(), Network(small_encoder(), recipe(), 0))
    whole = torch.arange(5 * 4 * 49.0).view(5, 4, 49, 1)
    for images in (slice(0, 2), slice(2, 4)):
        part = whole[:, images]
        references = objective._references(part, torch.ones(5, 2, 49), 0, RankShard(0, 2))
        assert set(references.flatten().tolist()) == set(part.flatten().tolist())


def test_queue_is_first_in_first_out_and_gives_no_empty_entries() -> None:
    settings = recipe(queue_length=25, head_dim=4)
    objective = NeCo(settings, Network(small_encoder(), settings, 0))
    shard = RankShard(0, 1)
    for number in range(4):
        shard.batch_number = number
        drawn = objective._draw_tokens(shard, 16)
        assert all(len(tokens.unique()) == 10 for _, tokens in drawn)
        objective._enqueue(torch.full((2, 1, 4, 4, 4), number + 1.0), None, drawn, shard)
        stored = objective.queue[0, : objective.filled[0], 0]
        newest = [float(t) for t in range(number + 1, 0, -1) for _ in range(10)][:25]
        assert stored.tolist() == newest
        references = objective._references(torch.zeros(5, 1, 49, 4), torch.ones(5, 1, 49), 1, shard)
        assert float(references.min()) >= 1
    assert references.shape == (5, 1, 49, 4)


def test_queue_takes_tokens_of_the_teacher_map() -> None:
    settings = recipe(queue_length=40)
    student, teacher = networks(settings)
    objective, shard = NeCo(settings, student), RankShard(0, 3)
    made = batch(3)
    objective(made, student, teacher, teacher, shard)
    tokens = embed_all(teacher, by_view(made.global_views)).unflatten(0, (2, 3)).permute(0, 1, 3, 4, 2).flatten(1, 3)
    for c in range(2):
        distance = (objective.queue[c, :30, None] - tokens[c]).norm(dim=-1).min(1).values
        assert float(distance.max()) < 1e-5
        assert not objective.queue[c, 30:].any()


def test_a_shuffled_teacher_teaches_no_patch_its_own_order() -> None:
    settings = recipe(shuffle_teacher=True)
    student, teacher = networks(settings)
    shuffled = float(NeCo(settings, student)(batch(3), student, teacher, teacher, RankShard(0, 3)))
    plain = float(NeCo(recipe(), student)(batch(3), student, teacher, teacher, RankShard(0, 3)))
    assert shuffled != pytest.approx(plain, rel=1e-4)
    same = NeCo(settings, teacher)(batch(3), teacher, teacher, teacher, RankShard(0, 3))
    aligned = NeCo(recipe(), teacher)(batch(3), teacher, teacher, teacher, RankShard(0, 3))
    assert float(same) > float(aligned)  # a network agrees with itself, and not with its shuffled self


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["fg", "bg"])
def test_masked_loss(mask: str) -> None:
    settings = recipe(loss_mask=mask, global_size=128)
    student, teacher = (
        Network(small_encoder("timm:vit_tiny_patch16_224?pretrained=false"), settings, i) for i in (1, 2)
    )
    student.requires_grad_()
    objective = NeCo(settings, student)
    loss = objective(batch(2, settings=settings), student, teacher, teacher, RankShard(0, 2))
    loss.backward()
    assert 0 < float(loss.detach()) < 2 * math.log(49)
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_masked_loss_needs_attention_and_patches() -> None:
    with pytest.raises(UsageError, match="class-token attention"):
        NeCo(recipe(loss_mask="fg"), Network(small_encoder("timm:resnet18?pretrained=false"), recipe(), 0))
    vit = Network(small_encoder("timm:vit_tiny_patch16_224?pretrained=false"), recipe(), 0)
    with pytest.raises(UsageError, match="at least 4 x 4 patches"):
        NeCo(recipe(loss_mask="fg", global_size=48), vit)


def test_a_queue_that_a_mask_left_empty_is_not_read() -> None:
    settings = recipe(loss_mask="fg", queue_length=8)
    objective = NeCo(settings, Network(small_encoder("timm:vit_tiny_patch16_224?pretrained=false"), settings, 0))
    aligned, mask = torch.randn(5, 2, 49, 4), torch.rand(5, 2, 49) > 0.5
    references = objective._references(aligned, mask, 0, RankShard(0, 2))
    for pair in range(5):
        inside = {tuple(row) for row in aligned[pair][mask[pair]].tolist()}
        assert {tuple(row) for row in references[pair].flatten(0, 1).tolist()} <= inside


def test_foreground_keeps_sixty_percent_of_the_attention_and_no_specks() -> None:
    attention = torch.full((1, 2, 12, 12), 1e-6)
    attention[..., 3:7, 4:8] = 1.0
    attention[..., 10, 10] = 0.9
    (mask,) = foreground(attention, 0.6)
    assert mask[3:7, 4:8].sum() >= 10
    assert not mask[9:, 9:].any()
    assert mask.sum() <= 36
    blurred = torchvision.transforms.functional.gaussian_blur(attention.mean(1), [7, 7], [0.6, 0.6])[0]
    assert 0.5 < float(blurred[mask].sum() / blurred.sum()) < 0.7


def test_views_of_one_size_and_no_local_views() -> None:
    for changes in ({"local_size": 64}, {"locals": 0}):
        settings = recipe(**changes)
        student, teacher = networks(settings)
        loss = NeCo(settings, student)(batch(2, settings=settings), student, teacher, teacher, RankShard(0, 2))
        assert math.isfinite(float(loss))


def test_masked_image_modelling_by_hand() -> None:
    settings = recipe(objective="mim", use_teacher=False, head_layers=1, hidden_share=0.5)
    student = Network(small_encoder(), settings, 0).eval()
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def embed(groups: list[torch.Tensor], needed: list[torch.Tensor]) -> list[torch.Tensor]:
        inputs.append((groups[0], needed[0]))
        return student(groups, needed)

    made = batch(2)
    loss = float(MaskedImages(settings, student)(made, embed, None, student, RankShard(0, 2)))
    images, hidden = by_view(made.global_views), inputs[0][1]
    assert hidden.flatten(1).sum(1).tolist() == [8] * 4
    predicted = student.projection_head(
        student.encoder._encode(inputs[0][0], final_norm=True, attention=False).map.permute(0, 2, 3, 1)
    )
    errors = []
    for image in range(4):
        for row in range(4):
            for column in range(4):
                patch = np.s_[image, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
                if hidden[image, row, column]:
                    assert not inputs[0][0][patch].any()
                    pixels = images[patch].flatten()
                    target = (pixels - pixels.mean()) / (pixels.std() + 1e-3)
                    errors.append((predicted[image, row, column] - target).square().mean())
                else:
                    assert torch.equal(inputs[0][0][patch], images[patch])
    assert loss == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


def test_gradients_and_colours_of_all_patches_by_hand() -> None:
    settings = recipe(objective="mim", use_teacher=False, head_layers=1, hidden_target="gradients", predict_all=True)
    student = Network(small_encoder(), settings, 0).eval()
    inputs: list[torch.Tensor] = []

    def embed(groups: list[torch.Tensor], needed: list[torch.Tensor]) -> list[torch.Tensor]:
        inputs.append(groups[0])
        assert needed[0].all()
        return student(groups, needed)

    made = batch(1)
    loss = float(MaskedImages(settings, student)(made, embed, None, student, RankShard(0, 1)))
    predicted = student.projection_head(
        student.encoder._encode(inputs[0], final_norm=True, attention=False).map.permute(0, 2, 3, 1)
    )
    errors = []
    for image, patches in zip(by_view(made.global_views).numpy(), predicted.detach().numpy(), strict=True):
        grey = np.pad(image.mean(0), 1, mode="edge")
        across, down = grey[1:-1, 2:] - grey[1:-1, :-2], grey[2:, 1:-1] - grey[:-2, 1:-1]
        strength = np.sqrt(across**2 + down**2 + 1e-12)
        place = np.mod(np.arctan2(down, across), np.pi) / np.pi * 9
        for row, column in np.ndindex(4, 4):
            target = np.zeros((12, 2, 2))
            for i, j in np.ndindex(2, 2):
                cell = np.s_[row * 16 + i * 8 : row * 16 + i * 8 + 8, column * 16 + j * 8 : column * 16 + j * 8 + 8]
                for weight, at in zip(strength[cell].ravel(), place[cell].ravel(), strict=True):
                    target[int(at) % 9, i, j] += weight * (1 - at % 1) / 64
                    target[(int(at) + 1) % 9, i, j] += weight * (at % 1) / 64
                target[:9, i, j] /= max(float(np.linalg.norm(target[:9, i, j])), 0.01)
                target[9:, i, j] = image[:, cell[0], cell[1]].mean((1, 2)) / 4
            errors.append(np.square(patches[row, column] - target.ravel()).mean())
    assert loss == pytest.approx(float(np.mean(errors)), rel=1e-6)
