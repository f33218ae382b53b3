"""``tierhints <verb>``: one file per verb, from flags to a library call to a table; no logic of its
own.
"""
