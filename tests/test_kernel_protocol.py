"""The kernel speaks Jupyter's protocol: the project's own conformance tests, against our kernelspec."""

import os
import tempfile
from unittest import mock

import jupyter_kernel_test

import flexmagic_kernel


class TestProtocol(jupyter_kernel_test.KernelTests):
    """What every Jupyter kernel has to answer."""

    kernel_name = "flexmagic"
    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('oops', file=sys.stderr)"
    completion_samples = (
        {"text": "zi", "matches": {"zip"}},
        {"text": "%flexru", "matches": {"%flexrun", "%%flexrun"}},
        {"text": "%flexrun --capt", "matches": {"--capture"}},
    )
    complete_code_samples = ("1", "print('hello')", "%flexcluster status")
    incomplete_code_samples = ("print('hello", "for i in range(3):")
    invalid_code_samples = ("import = 7q",)
    code_page_something = "zip?"
    code_generate_error = "%flexrun 'nothing is started'"
    code_execute_result = ({"code": "1+2+3", "result": "6"}, {"code": "6 * 7", "result": "42"})
    code_display_data = (
        {"code": "from IPython.display import HTML, display; display(HTML('<b>x</b>'))", "mime": "text/html"},
    )
    code_history_pattern = "1?2*"
    supported_history_operations = ("tail", "search")
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"

    @classmethod
    def setUpClass(cls):
        home = tempfile.TemporaryDirectory()
        cls.addClassCleanup(home.cleanup)
        flexmagic_kernel.install(prefix=home.name)
        places = {"JUPYTER_PATH": f"{home.name}/share/jupyter", "IPYTHONDIR": home.name}
        cls.enterClassContext(mock.patch.dict(os.environ, places))
        super().setUpClass()
