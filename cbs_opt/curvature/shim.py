from cbs_opt.curvature.fisher import gradient_rows as _gr
from cbs_opt.curvature.rows import streamed_rows as _sr


def gradient_rows(model, data, loss_fn, partition, *, curvature, resources, seed, progress, journal, **kw):
    common = dict(
        curvature=curvature.kind,
        samples=curvature.samples,
        samples_per_row=getattr(curvature, "per_row", 1),
        memory_limit=resources.chunk_memory,
        seed=seed,
        progress=progress,
        journal=journal,
    )
    if kw:
        return _gr(model, data, loss_fn, partition, **common, **kw)
    return _sr(
        model, data, loss_fn, partition, row_memory=resources.row_memory, row_dir=resources.row_dir, **common
    )
