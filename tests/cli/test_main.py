import subprocess
import sys

from typer.testing import CliRunner

from downriver import __version__
from downriver.cli import app


def downriver(*arguments: str, **keywords) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'downriver'; from downriver.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **keywords)


def test_help_names_every_command_and_loads_no_torch():
    code = (
        "import sys\nfrom downriver.cli import main\nsys.argv = ['downriver', '--help']\n"
        "try: main()\nexcept SystemExit: pass\nprint('TORCH', 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in ("study", "merge", "forecast", "papers", "reproduce", "assets"):
        assert command in out
    assert "TORCH False" in out


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == f"downriver {__version__}"


def test_an_error_of_ours_is_one_line_and_exit_code_2(tmp_path):
    done = downriver("reproduce", "tie", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "did you mean 'ties'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
