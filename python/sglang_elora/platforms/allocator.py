"""KV page allocators of the CPU platform."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages


def allocator_for_page_size(size: int, page_size: int, **kwargs: Any) -> TokenToKVPoolAllocator:
    """Build the allocator SGLang would use on CUDA for this page size.

    Args:
        size: Token slots in the pool.
        page_size: Slots per page.
        kwargs: dtype, device, kvcache, need_sort, as SGLang passes them.
    """
    if page_size == 1:
        return TokenToKVPoolAllocator(size, **kwargs)
    return TorchPagedAllocator(size, page_size=page_size, **kwargs)


class TorchPagedAllocator(PagedTokenToKVPoolAllocator):
    """The paged allocator with its two Triton kernels replaced by SGLang's torch reference."""

    free_pages: torch.Tensor  # int64, ids of the pages nobody holds

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,  # int64 [batch]
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,  # int64 [batch]
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,  # int64 [batch], slot of each last prefix token
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for the new tokens, int64 ``[extend_num_tokens]``, or None if pages run out."""
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if num_new_pages > len(self.free_pages):
            self.merge_and_sort_free()
        if num_new_pages > len(self.free_pages):
            return None
        slots = torch.empty((extend_num_tokens,), dtype=torch.int64, device=self.device)
        alloc_extend_naive(
            prefix_lens, seq_lens, last_loc, self.free_pages, slots, self.page_size, self.device
        )
        self.free_pages = self.free_pages[num_new_pages:]
        return slots

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """Slots for one token per request: an extension by one."""
        return self.alloc_extend(
            seq_lens - 1, seq_lens_cpu - 1, seq_lens, seq_lens_cpu, last_loc, len(seq_lens)
        )
