import pytest


@pytest.fixture(params=["ptq", "qat"])
def quantizer(request, make_ptq, make_qat):
    return (make_ptq if request.param == "ptq" else make_qat)()
