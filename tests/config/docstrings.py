"""What the command line says of a field."""

import ast
import inspect


def docstrings(kind: type) -> dict[str, str]:
    """Each field's docstring, read from the source."""
    found: dict[str, str] = {}
    for base in reversed([b for b in kind.__mro__ if b is not object]):
        (body,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(body, ast.ClassDef)
        for line, following in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation):
                assert isinstance(line.target, ast.Name)
                text = following.value if isinstance(following, ast.Expr) else None
                found[line.target.id] = str(text.value) if isinstance(text, ast.Constant) else ""
    return found
