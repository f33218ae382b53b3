"""Compressed KV caches compared layer by layer, for docs/kv_cache.md; the cache is in
lib/progressive.
"""
