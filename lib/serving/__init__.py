"""The OpenAI-compatible endpoint: requests over HTTP, each with the quality bound it declares.

``app.py`` has the routes, ``serve.py`` the process around them; what generates is behind the
protocol of ``engine.py``. Needs the extra ``serve``. ``replicas.py`` and ``cluster.py`` serve on
Ray, by the extra ``ray``.
"""
