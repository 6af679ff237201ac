"""The house's sum: how much code there is, in which order, and that somebody uses it.

Counted are nodes of the syntax tree without contexts, operators, keywords and annotations, so that
naming a value costs little and packing lines wins nothing.
"""

import ast
import json
import re

from conftest import HERE, ROOT

MODULE = ROOT / "helpers.py"
TESTS = HERE
FREE = (ast.expr_context, ast.operator, ast.cmpop, ast.boolop, ast.unaryop, ast.keyword)
# The plan's nodes per section; one may stand a tenth above its line where others stand below.
SECTIONS = {
    "0  Ground": 1_000,
    "1  Configuration": 800,
    "2  Data": 2_300,
    "3  Loader": 1_350,
    "4  Students": 900,
    "5  Teacher": 550,
    "6  Losses": 750,
    "7  Training": 2_000,
    "8  Submission": 700,
    "9  Runs": 1_800,
    "10  Pictures": 1_500,
    "11  Report": 1_000,
    # The plan has 350, too few for four commands with their help.
    "12  Command line": 511,
}
PARTS = {
    "helpers.py": (15_000, [MODULE]),
    "submission/exercises.py": (2_300, [ROOT / "submission" / "exercises.py"]),
    "submission/export.py": (450, [ROOT / "submission" / "export.py"]),
    "tests": (20_000, sorted(TESTS.glob("*.py"))),
    "tests/bench": (8_000, sorted((TESTS / "bench").glob("*.py"))),
}
HEAD = re.compile(r"# \d+ +\S")


def count(tree):
    """The nodes of a tree that cost something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.FunctionDef):
            node.returns = None
    return sum(not isinstance(node, FREE) for node in ast.walk(tree))


def sections():
    """{head of a section: its top-level statements}; what stands above the first is its own."""
    text = MODULE.read_text(encoding="utf-8")
    heads = []
    for number, line in enumerate(text.splitlines(), 1):
        if HEAD.match(line):
            heads.append((number, line[2:]))
    found = {head: [] for _, head in heads}
    for statement in ast.parse(text).body:
        before = [head for number, head in heads if number < statement.lineno]
        found[before[-1] if before else heads[0][1]].append(statement)
    return found


def names_bound(statement):
    """The names that a top-level statement gives."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    nodes = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
    return [node.id for node in nodes if isinstance(node.ctx, ast.Store)]


def names_used(statement):
    """The names and attributes that a statement reads."""
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(statement) if isinstance(node, ast.Attribute)}


def test_each_section_keeps_its_budget():
    over = []
    for head, statements in sections().items():
        nodes = count(ast.Module(statements, []))
        print(f"{nodes:7,} of {SECTIONS[head]:6,}  {head}")
        if nodes > 1.1 * SECTIONS[head]:
            over.append(head)
    assert not over


def test_each_part_keeps_its_sum():
    for name, (budget, paths) in PARTS.items():
        nodes = sum(count(ast.parse(path.read_text(encoding="utf-8"))) for path in paths)
        print(f"{nodes:7,} of {budget:6,}  {name}")
        assert nodes <= budget, name


def test_no_section_uses_a_name_of_a_later_one():
    place = {}
    parts = list(sections().items())
    for number, (_, statements) in enumerate(parts):
        for statement in statements:
            place.update(dict.fromkeys(names_bound(statement), number))
    back = []
    for number, (head, statements) in enumerate(parts):
        for statement in statements:
            used = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            later = [name for name in used if place.get(name, 0) > number]
            # A method's argument may be called as something later; a definition is an arrow.
            own = {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}
            stored = {
                node.id
                for node in ast.walk(statement)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            }
            back += [(head, name) for name in later if name not in own | stored]
    assert not back


def header_size(statement):
    """The nodes of a statement without those of the statements in it."""
    waiting = [statement]
    n = 0
    while waiting:
        node = waiting.pop()
        n += 1
        for child in ast.iter_child_nodes(node):
            is_part = isinstance(child, (ast.stmt, ast.excepthandler))
            if not is_part and not isinstance(child, FREE[:-1]):
                waiting.append(child)
    return n


def test_a_statement_holds_one_thought():
    tree = ast.parse(MODULE.read_text(encoding="utf-8"))
    sizes = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for statement in ast.walk(function):
            is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            skipped = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
            is_counted = isinstance(statement, ast.stmt) and not isinstance(statement, skipped)
            if is_counted and not is_text:
                sizes.append(header_size(statement))
    sizes.sort()
    assert sizes[int(0.9 * len(sizes))] <= 14


def test_no_conditional_stands_in_another_and_no_text_is_multiplied():
    for node in ast.walk(ast.parse(MODULE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.IfExp):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.IfExp)]
            assert len(inner) == 1, node.lineno
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for side in (node.left, node.right):
                is_text = isinstance(side, ast.Constant) and isinstance(side.value, str)
                assert not is_text and not isinstance(side, ast.JoinedStr), node.lineno


def code_of_notebook():
    """All code and all prose of the notebook: exercises' solutions are in the prose."""
    folder = MODULE.parent
    cells = json.loads((folder / "hw13_distill.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def test_every_function_is_used_by_somebody():
    users = [code_of_notebook(), (ROOT / "README.md").read_text(encoding="utf-8")]
    for path in (*(ROOT / "submission").glob("*.py"), *(TESTS / "bench").glob("*.py")):
        users.append(path.read_text(encoding="utf-8"))
    text = "\n".join(users)
    statements = [statement for part in sections().values() for statement in part]
    used_somewhere = names_used(ast.Module(statements, []))
    defined = {}
    reached = {"main"}
    for statement in statements:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            defined[statement.name] = statement
            if re.search(rf"\b{statement.name}\b", text):
                reached.add(statement.name)
        else:
            reached |= names_used(statement) & used_somewhere
    waiting = [name for name in reached if name in defined]
    while waiting:
        for name in names_used(defined[waiting.pop()]):
            if name in defined and name not in reached:
                reached.add(name)
                waiting.append(name)
    assert not sorted(set(defined) - reached)
