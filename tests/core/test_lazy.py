import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_downriver_or_its_command_line_loads_no_deep_learning_library():
    heavy = "{'torch', 'transformers', 'datasets', 'scipy', 'sklearn', 'duckdb', 'polars', 'matplotlib'}"
    assert run(f"import sys, downriver, downriver.cli; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_every_room_opens_without_torch_and_lists_its_names():
    code = (
        "import sys, downriver\n"
        "for room in downriver.ROOMS: assert dir(getattr(downriver, room)), room\n"
        "print('torch' in sys.modules)"
    )
    assert run(code) == "False"


def test_a_function_wins_over_the_module_of_its_name_whatever_is_imported_first():
    assert run("import downriver.merge.ties; from downriver.merge import ties; print(callable(ties))") == "True"
    assert run("from downriver.merge import ties; import downriver.merge.ties; print(callable(ties))") == "True"
    code = "import downriver.merge as m; import downriver.merge.ties; print(callable(m.ties))"
    assert run(code) == "True"


def test_every_public_name_of_every_room_can_be_had():
    code = (
        "import downriver\n"
        "for room in downriver.ROOMS:\n"
        "    module = getattr(downriver, room)\n"
        "    for name in module.__all__: assert getattr(module, name) is not None, (room, name)\n"
        "print('ok')"
    )
    assert run(code) == "ok"
