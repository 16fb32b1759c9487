"""ProxyNCA as in ``benchmarks.ops.proxy_nca``, with rows and proxies of D = 512."""

from benchmarks.ops import proxy_nca

OP = proxy_nca.op("proxy_nca_512", __name__, sizes=(20_000, 100_000, 1_000_000), d=512)
