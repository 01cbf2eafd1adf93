"""One entry point per operator name, all of them leading to two C functions (see cann/operators.c).

System V on x86-64: the first six integers or pointers come in registers, the first eight floating-point numbers in
others, the rest on the stack; aarch64 would need a second template.
"""

from __future__ import annotations

import re
from pathlib import Path

_OPERATOR = re.compile(rb"aclnn[A-Z][A-Za-z0-9_]*(?=\0)")
_INTEGERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")

_COMMON = """
    .section .note.GNU-stack,"",@progbits
    .text
prepare_entry:
    push %rbp
    mov %rsp, %rbp
    sub $112, %rsp
{save}
    mov %eax, %edi
    mov %rsp, %rsi
    lea 48(%rsp), %rdx
    lea 16(%rbp), %rcx
    call emulated_prepare@PLT
    leave
    ret
"""

_ENTRY = """
    .globl {name}GetWorkspaceSize
    .type {name}GetWorkspaceSize, @function
{name}GetWorkspaceSize:
    mov ${index}, %eax
    jmp prepare_entry
    .globl {name}
    .type {name}, @function
{name}:
    mov ${index}, %r8d
    jmp emulated_execute@PLT
"""

# A few operators have a third function, the largest workspace any arguments need; it takes the same arguments.
_MAXIMUM_ENTRY = """
    .globl {name}GetMaxWorkspaceSize
    .type {name}GetMaxWorkspaceSize, @function
{name}GetMaxWorkspaceSize:
    mov ${index}, %eax
    jmp prepare_entry
"""


def operator_names(wheel: Path) -> list[str]:
    """All aclnn operators the wheel may call: those whose ``...GetWorkspaceSize`` it names too."""
    text = (wheel / "lib" / "libtorch_npu.so").read_bytes()
    found = {match.decode() for match in _OPERATOR.findall(text)}
    return sorted(name for name in found if f"{name}GetWorkspaceSize" in found or f"{name}GetMaxWorkspaceSize" in found)


def assembly(names: list[str]) -> str:
    """The trampolines, and the table of names by index."""
    save = [f"    mov %{register}, {8 * i}(%rsp)" for i, register in enumerate(_INTEGERS)]
    save += [f"    movsd %xmm{i}, {48 + 8 * i}(%rsp)" for i in range(8)]
    parts = [_COMMON.replace("{save}", "\n".join(save))]
    parts += [(_ENTRY + _MAXIMUM_ENTRY).format(name=name, index=index) for index, name in enumerate(names)]
    table = [f'name_{index}: .asciz "{name}"' for index, name in enumerate(names)]
    parts += ["    .section .rodata", *table, "    .section .data.rel.ro", "    .balign 8"]
    parts += ["    .globl emulated_operator_names", "emulated_operator_names:"]
    parts += [f"    .quad name_{index}" for index in range(len(names))]
    parts += ["    .globl emulated_operator_count", "emulated_operator_count:", f"    .quad {len(names)}"]
    return "\n".join(parts) + "\n"
