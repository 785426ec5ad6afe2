"""Decoding with a memory: the memory drafts, the base verifies, and the text has the mixture's law.

Reached through ``MemoryModel.generate(..., decoding=...)``; see docs/decoding.md.
"""
