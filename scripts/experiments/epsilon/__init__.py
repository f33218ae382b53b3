"""Whether measured KL stays within epsilon, for docs/veto.md; the veto is in lib/policy."""
