"""TokenLosses: what the stages minimise per completion token, from hidden states, without logits of all tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .losses import distillation_loss, forward_kl


@dataclass(frozen=True)
class TokenLosses:
    """
    Loss and measures of completion tokens. Logits are made for `chunk_tokens` tokens at a time, and made again in the
    backward pass, so that neither the number of tokens nor the vocabulary sets the memory peak: at most about six
    tensors of `chunk_tokens * vocab_size` float32 numbers are held.

    Args:
        name (`str`): Distillation loss, see [`distillation_loss`].
        temperature (`float`): Softens both distributions.
        mixture (`float`, *optional*): For the losses that mix both distributions.
        top_k (`int`): Teacher's tokens that are told apart; 0: all.
        distillation_weight (`float`): Weight of the distillation loss.
        cross_entropy_weight (`float`): Weight of the labels' negative log-likelihood.
        chunk_tokens (`int`): Tokens per chunk; 0: all in one, and nothing is computed twice.
    """

    name: str = "forward_kl"
    temperature: float = 1.0
    mixture: float | None = None
    top_k: int = 0
    distillation_weight: float = 1.0
    cross_entropy_weight: float = 0.0
    chunk_tokens: int = 256

    def __call__(
        self,
        student_head: Callable[[torch.Tensor], torch.Tensor],
        teacher_head: Callable[[torch.Tensor], torch.Tensor],
        student_hidden: torch.Tensor,
        teacher_hidden: torch.Tensor,
        labels: torch.Tensor,
        num_chunks: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            student_head (`Callable`): Makes logits of the student's hidden states ([`LMHead`]).
            teacher_head (`Callable`): The same for the teacher's.
            student_hidden (`torch.Tensor`): Shape `(num_tokens, hidden_size)`.
            teacher_hidden (`torch.Tensor`): Shape `(num_tokens, hidden_size)`.
            labels (`torch.LongTensor`): Shape `(num_tokens,)`.
            num_chunks (`int`, *optional*): How often the heads are called, where all processes have to do it equally
                often (a partitioned weight is gathered by all of them).

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The loss, shape `(num_tokens,)`; and, without gradient, the measures
            KL(teacher || student) in nats, the label's negative log-likelihood, and whether both find the same token
            likeliest, shape `(num_tokens, 3)`.
        """

        def chunk(student_part: torch.Tensor, teacher_part: torch.Tensor, labels_part: torch.Tensor):
            with torch.no_grad():
                teacher_logits = teacher_head(teacher_part).to(student_part.device)
            return self._of_logits(student_head(student_part), teacher_logits, labels_part)

        count = self.num_chunks(len(labels)) if num_chunks is None else num_chunks
        if count == 1 and not self.chunk_tokens:
            return chunk(student_hidden, teacher_hidden, labels)
        parts = zip(*(t.tensor_split(count) for t in (student_hidden, teacher_hidden, labels)), strict=True)
        # The checks compare shapes, and a partitioned weight has none once it is given back.
        results = [checkpoint(chunk, *part, use_reentrant=False, determinism_check="none") for part in parts]
        return torch.cat([loss for loss, _ in results]), torch.cat([measures for _, measures in results])

    def num_chunks(self, num_tokens: int) -> int:
        """In how many chunks so many tokens are computed; at least one."""
        return -(-max(num_tokens, 1) // self.chunk_tokens) if self.chunk_tokens else 1

    def _of_logits(
        self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = torch.zeros(labels.shape, dtype=torch.float32, device=student.device)
        distilled = None
        if self.distillation_weight:
            distilled = distillation_loss(student, teacher, self.name, self.temperature, self.mixture, self.top_k)
            loss = loss + self.distillation_weight * distilled
        if self.cross_entropy_weight:
            loss = loss + self.cross_entropy_weight * F.cross_entropy(student.float(), labels, reduction="none")
        with torch.no_grad():
            is_kl = distilled is not None and (self.name, self.temperature, self.top_k) == ("forward_kl", 1.0, 0)
            kl = distilled if is_kl else forward_kl(student, teacher)
            nll = F.cross_entropy(student.float(), labels, reduction="none")
            agrees = (student.argmax(-1) == teacher.argmax(-1)).float()
            return loss, torch.stack([kl.detach(), nll, agrees], dim=-1)
