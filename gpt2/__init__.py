"""The training application: a GPT-2 or a mixture of experts on real text, then its tier_hints.json.

``python -m gpt2.train`` reads ``.config``. data.py turns documents (``lib.text.sources``) into
token shards, model.py builds the network, balance.py keeps its experts in use, distributed.py knows
about ranks, checkpoint.py and rundir.py own the files of a run, hints.py writes the hints.
"""
