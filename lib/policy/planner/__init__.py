"""The planner: from needs, budget and machine to a plan. Pure: no torch, no device, no clock."""
