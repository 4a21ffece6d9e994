"""`show`: a figure with words, shown once."""

from IPython.utils.capture import capture_output
from matplotlib import pyplot as plt

from locogen.views.notebook import show


def test_a_figure_is_shown_once_and_with_its_words(monkeypatch) -> None:
    shown = []
    monkeypatch.setattr(
        "IPython.display.display", lambda *things, **options: shown.append((things, options))
    )
    figure, ax = plt.subplots()
    with capture_output():
        show(ax, "a rising curve")
    assert shown == [((figure,), {"metadata": {"image/png": {"alt": "a rising curve"}}})]
    assert not plt.get_fignums(), "left open, it would be shown again without its words"
    other = plt.figure()
    show(other, "the figure itself")
    assert shown[1][0] == (other,)
