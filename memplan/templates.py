"""The templates of a program, printed, built and ready to launch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .codegen.triton_kernel import TritonKernel
from .codegen.triton_product import emit_launches
from .ir.config import Config
from .ir.early_launch import EarlyLaunch, early_template
from .ir.errors import CompilerError
from .ir.program import Program
from .ir.template import Product, Template, canonical_product
from .kernels import BuiltKernels, KernelArguments
from .runtime.triton_build import Build, Target, compile_builds
from .runtime.triton_launch import make_launcher


@dataclass(frozen=True)
class TemplateSet:
    """For each template its arguments; for each source (of a device) the canonical product."""

    arguments: dict[str, KernelArguments]
    sources: dict[str, tuple[str, Product]]


NO_TEMPLATES = TemplateSet({}, {})


def collect_templates(program: Program) -> TemplateSet:
    """Equal products share one source; names are deterministic."""
    names: dict[tuple[str, Product], str] = {}
    arguments: dict[str, KernelArguments] = {}
    sources: dict[str, tuple[str, Product]] = {}
    for op in program.operations:
        if not isinstance(op, Template) or op.product is None:
            continue
        canonical = canonical_product(op.product)
        key = (op.device, canonical.product)
        if key not in names:
            names[key] = f"t{len(names)}_{canonical.product.config.method.value}_product"
            sources[names[key]] = key
        spaces = op.workspace_buffers
        offsets = (*canonical.offsets, *(0 for _ in spaces)) if any(canonical.offsets) else ()
        arguments[op.name] = KernelArguments(names[key], (*canonical.buffers, *spaces), (), offsets)
    return TemplateSet(arguments, sources)


def emitted_templates(templates: TemplateSet, early: EarlyLaunch) -> dict[str, TritonKernel]:
    """The kernels of all products by their names: of some of them two."""
    made = (emit_launches(product, name=name, early=early) for name, (_, product) in templates.sources.items())
    return {kernel.name: kernel for kernels in made for kernel in kernels}


def with_templates(built: BuiltKernels, templates: TemplateSet, config: Config) -> BuiltKernels:
    """The kernels and the templates of a program.

    Raises
    ------
    CompilerError
        If Triton refuses a template, which it took when it was measured.
    """
    if not templates.sources:
        return built
    target = Target.current()
    emitted = emitted_templates(templates, early_template(config.early_launch, target.arch))
    devices = {n: device for name, (device, p) in templates.sources.items() for n in p.launches(name)}
    compiled = compile_builds([Build.of(k, k.configs[0]) for k in emitted.values()], target)
    launchers = dict(built.launchers)
    callables = dict(built.callables)
    for (name, kernel), found in zip(emitted.items(), compiled, strict=True):
        if isinstance(found, CompilerError):
            raise found
        launchers[name] = make_launcher(kernel, found, int(devices[name].partition(":")[2] or 0))
        callables[name] = launchers[name].bound()
    source = built.source + "\n".join(k.source for k in emitted.values())
    return replace(built, callables=callables, launchers=launchers, emitted={**built.emitted, **emitted}, source=source)
