"""The NeCo objective: patch neighbour consistency (Pariza et al., ICLR 2025, section 3)."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from neco_bench.core.distributed import RankShard
from neco_bench.core.errors import UsageError
from neco_bench.core.reduce import mean_over_processes, rows_of_all
from neco_bench.core.rng import item_rng
from neco_bench.features.attention import MIN_SIDE, foreground
from neco_bench.training.batches import Embed, TrainBatch, by_view
from neco_bench.training.loss import neco_loss
from neco_bench.training.networks import Network
from neco_bench.training.recipe import Recipe
from neco_bench.training.regions import align
from neco_bench.training.views import GLOBALS


def patches_read(boxes: Tensor, stride: int, side: int) -> Tensor:
    """Mark the patches (N, side, side) bool that `align` reads for boxes (N, R, 4) in pixels."""
    first = (boxes[..., :2] / stride - 0.5).clamp_min(0).floor()
    last = (boxes[..., 2:] / stride - 0.5).clamp_min(0).floor() + 1
    at = torch.arange(side, device=boxes.device)
    across = (at >= first[..., :1]) & (at <= last[..., :1])
    down = (at >= first[..., 1:]) & (at <= last[..., 1:])
    return (down[..., :, None] & across[..., None, :]).any(1)


class NeCo(nn.Module):
    """Patch neighbour consistency (Pariza et al., ICLR 2025), with the choices of the official code.

    Deviations: references are drawn only from the filled part of a queue (the official code uses zero vectors until it
    is full, and fails for a batch of 168 or more). Processes share references, but the parts of a step made by
    `accumulate` do not. Euclidean distances are computed from differences (official code: matrix product; 1e-6 of the
    loss). A masked loss uses the class token's softmax over patches only as attention, and references from the cells of
    its own pair of views; its queue grows by the drawn tokens that are inside the mask. The teacher runs without
    gradient.
    """

    queue: Tensor
    filled: Tensor

    def __init__(self, recipe: Recipe, student: Network) -> None:
        """Raise UsageError for a masked loss on an encoder without class-token attention, or on too few patches."""
        super().__init__()
        encoder = student.encoder
        if recipe.loss_mask != "all" and not encoder.attentions:
            raise UsageError(
                f"loss_mask={recipe.loss_mask} needs class-token attention, which --base {encoder.name!r} does not "
                f"have. Use a plain ViT with a class token, or loss_mask=all."
            )
        if recipe.loss_mask != "all" and recipe.global_size < MIN_SIDE * encoder.stride:
            raise UsageError(
                f"loss_mask={recipe.loss_mask} needs global views of at least {MIN_SIDE} x {MIN_SIDE} patches. Use "
                f"--set global_size={MIN_SIDE * encoder.stride} or more."
            )
        self.recipe, self.stride = recipe, encoder.stride
        self.register_buffer("queue", torch.zeros(GLOBALS, recipe.queue_length, recipe.head_dim))
        self.register_buffer("filled", torch.zeros(GLOBALS, dtype=torch.int64))

    def forward(
        self, batch: TrainBatch, student: Embed, teacher: Network | None, attend: Network, shard: RankShard
    ) -> Tensor:
        """Compute the loss, a scalar. teacher: None uses the student's targets. attend: network for attention masks."""
        count, side = shard.images, self.recipe.global_size // self.stride
        groups, stride = batch.groups(), self.stride
        # Patches that are needed: in the student's global views, the overlap with the other global view; in the
        # teacher, the overlap with any other view, and the tokens for the queue.
        read = [patches_read(self._crossed(batch), stride, side)]
        if len(groups) > 1:
            read.append(patches_read(by_view(batch.all[:, GLOBALS:]), stride, self.recipe.local_size // stride))
        other_views = [[v for v in range(batch.gc.shape[2]) if v != c] for c in range(GLOBALS)]
        boxes = [batch.gc[:, c, other_views[c]] for c in range(GLOBALS)]
        by_teacher = torch.cat([patches_read(b, stride, side) for b in boxes])
        drawn = self._draw_tokens(shard, side * side)
        for c, (_, tokens) in enumerate(drawn):
            by_teacher[c * count : (c + 1) * count].view(-1)[tokens] = True
        if teacher is None:
            read[0] |= by_teacher
        embedded = student(groups, read)
        with torch.no_grad():
            targets = embedded[0] if teacher is None else teacher(groups[:1], [by_teacher])[0]
            inside = None
            if self.recipe.loss_mask != "all":
                share = 0.6  # of the attention, in the official code
                inside = foreground(attend.attention(groups[0]).float(), share) ^ (self.recipe.loss_mask == "bg")
        with torch.autocast(targets.device.type, enabled=False):
            targets = targets.unflatten(0, (GLOBALS, count))
            self._enqueue(targets.detach(), inside, drawn, shard)
            students, teachers, references, masks = [], [], [], []
            aligned = self._align_students(embedded, batch)
            for c, others in enumerate(other_views):
                students.append(torch.stack([aligned[v][:, 0 if v < GLOBALS else c] for v in others]))
                teachers.append(align(targets[c], boxes[c], self.stride, self.recipe.cells).transpose(0, 1))
                masks.append(torch.ones_like(teachers[c][..., 0], dtype=torch.bool))
                if inside is not None:  # a bilinear mean of ones, up to rounding
                    cover = inside.float().unflatten(0, (GLOBALS, count))[c][:, None]
                    cover = align(cover, boxes[c], self.stride, self.recipe.cells).transpose(0, 1)
                    masks[c] = cover[..., 0] > 1 - 1e-4
                references.append(self._references(teachers[c], masks[c], c, shard))
            pool = torch.cat(references)
            return self._loss(
                self._similarity(torch.cat(students), pool),
                self._similarity(torch.cat(teachers), pool),
                torch.cat(masks),
                shard,
            )

    def _crossed(self, batch: TrainBatch) -> Tensor:
        """Return the box of the other global view in each global view, (2 B, 1, 4)."""
        return by_view(torch.stack([batch.all[:, v, 1 - v, None] for v in range(GLOBALS)], 1))

    def _align_students(self, embedded: list[Tensor], batch: TrainBatch) -> list[Tensor]:
        """Align each view to (B, regions, cells², E): a global view with the other one, a local view with both."""
        regions = [(embedded[0], self._crossed(batch))]
        if len(embedded) > 1:
            regions.append((embedded[1], by_view(batch.all[:, GLOBALS:])))
        aligned = (align(maps, boxes, self.stride, self.recipe.cells) for maps, boxes in regions)
        return [view for part in aligned for view in part.split(len(batch.gc))]

    def _loss(self, by_student: Tensor, by_teacher: Tensor, mask: Tensor, shard: RankShard) -> Tensor:
        """Return the mean over pairs of views of the mean over cells in the mask; (pairs, B, cells², references)."""
        recipe = self.recipe
        if recipe.shuffle_teacher:
            whole = rows_of_all(by_teacher.detach().transpose(0, 1), shard).transpose(0, 1)
            order = torch.from_numpy(
                item_rng(shard.seed, "shuffle", shard.batch_number, 0).permutation(whole[..., 0].numel())
            )
            mine = order.view(whole.shape[:-1])[:, shard.start : shard.start + shard.images]
            by_teacher = whole.flatten(0, -2)[mine.to(whole.device)]

        def loss(students: Tensor, teachers: Tensor) -> Tensor:
            return neco_loss(
                students,
                teachers,
                network=recipe.network,
                student_steepness=recipe.student_steepness,
                teacher_steepness=recipe.teacher_steepness,
            )

        if recipe.loss_mask == "all":
            return loss(by_student.flatten(0, -2), by_teacher.flatten(0, -2))
        cells = mask.flatten(1).sum(1).float()
        share = cells / mean_over_processes(cells).clamp_min(1e-9)
        parts = [loss(by_student[i][m], by_teacher[i][m]) * share[i] for i, m in enumerate(mask) if m.any()]
        return (sum(parts) + by_student.sum() * 0) / len(mask)  # a pair without cells contributes 0

    def _similarity(self, vectors: Tensor, references: Tensor) -> Tensor:
        """Return (pairs, B, cells², references): the cosine, or the Euclidean distance, whose order is reversed."""
        if self.recipe.similarity == "euclidean":
            return torch.cdist(vectors, references, compute_mode="donot_use_mm_for_euclid_dist")
        return F.normalize(vectors, dim=-1) @ F.normalize(references, dim=-1).transpose(-1, -2)

    def _references(self, aligned: Tensor, mask: Tensor, c: int, shard: RankShard) -> Tensor:
        """Draw references (V - 1, B, references, E) for each image and pair of views with global view c.

        They are drawn from a queue, or from the aligned teacher vectors (V - 1, B, cells², E) of the whole batch that
        are in the mask, each with equal frequency.
        """
        count = self.recipe.references
        if self.recipe.queue_length and self.filled[c]:  # with a mask, the first draw may have left it empty
            pools = [self.queue[c, : self.filled[c]]] * len(aligned)
        else:
            pools = list(rows_of_all(aligned.transpose(0, 1), shard).transpose(0, 1).flatten(1, 2))
            if self.recipe.loss_mask != "all":
                inside = rows_of_all(mask.transpose(0, 1).float(), shard).transpose(0, 1).flatten(1) > 0
                pools = [pool[m] if m.any() else pool for pool, m in zip(pools, inside, strict=True)]
        references = []
        for pair, pool in enumerate(pools):
            rng = item_rng(shard.seed, "references", shard.batch_number, c, pair)
            length = self.recipe.queue_length or len(pool)  # indices wrap around in a queue that is not full yet
            order = np.resize(rng.permutation(length) % len(pool), shard.total * count)
            mine = order[shard.start * count : (shard.start + shard.images) * count]
            references.append(pool[torch.from_numpy(mine).to(pool.device)].unflatten(0, (shard.images, count)))
        return torch.stack(references)

    def _draw_tokens(self, shard: RankShard, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Return, for each global view, the tokens of the batch for its queue: the positions in the draw that belong to
        this process, and the indices of its tokens, counted over its images."""
        if not self.recipe.queue_length:
            return []
        drawn = []
        for c in range(GLOBALS):
            rng = item_rng(shard.seed, "queue", shard.batch_number, c)
            order = torch.from_numpy(rng.permutation(shard.total * tokens)[: self._growth(shard)])
            mine = (order >= shard.start * tokens) & (order < (shard.start + shard.images) * tokens)
            drawn.append((mine.nonzero()[:, 0], order[mine] - shard.start * tokens))
        return [(places.to(self.queue.device), own.to(self.queue.device)) for places, own in drawn]

    def _growth(self, shard: RankShard) -> int:
        return min(self.recipe.queue_per_image * shard.total, self.recipe.queue_length)

    def _enqueue(
        self, targets: Tensor, inside: Tensor | None, drawn: list[tuple[Tensor, Tensor]], shard: RankShard
    ) -> None:
        """Put the drawn tokens of teacher maps (2, B, E, h, w) that are inside the mask at the head of the queues."""
        for c, (places, tokens) in enumerate(drawn):
            new = targets.new_zeros(self._growth(shard), targets.shape[2] + 1)
            new[places, 0] = 1.0
            if inside is not None:
                new[places, 0] = inside.view(GLOBALS, -1)[c][tokens].to(new.dtype)
            new[places, 1:] = targets[c].permute(0, 2, 3, 1).flatten(0, 2)[tokens]
            if dist.is_initialized():
                dist.all_reduce(new)
            new = new[new[:, 0] > 0, 1:]
            self.queue[c] = torch.cat([new, self.queue[c]])[: self.recipe.queue_length]
            self.filled[c] = (self.filled[c] + len(new)).clamp_max(self.recipe.queue_length)
