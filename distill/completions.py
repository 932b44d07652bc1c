"""What each model makes of the same beginnings, side by side: a part of the report, and a page."""

from collections.abc import Mapping, Sequence
from html import escape

from distill.page import PAGE

Samples = Mapping[str, Sequence[Mapping[str, str]]]

# Written beside the report, which links to it.
FILE = 'completions.html'


def side_by_side(samples: Samples, *, limit: int | None = None) -> str:
    """Renders each prompt once, with every model's continuation beside the others.

    Args:
        samples: for each model its texts, `{'prompt', 'text'}`, in the same order for every model;
            `source`, where there is one, is how the text goes on where the prompt was taken from.
        limit: prompts that are shown; None for all.

    Returns:
        HTML in which everything a user or a model wrote is escaped.
    """
    blocks = []
    for index in range(max(map(len, samples.values()), default=0))[:limit]:
        texts = {name: rows[index] for name, rows in samples.items() if index < len(rows)}
        first = next(iter(texts.values()))
        cards = [_card(name, row['prompt'], row['text'], name) for name, row in texts.items()]
        if 'source' in first:
            cards.append(_card('source', first['prompt'], first['source'], 'how it goes on'))
        label = escape(first['prompt'])
        blocks.append(f'<div class="samples" aria-label="{label}">{"".join(cards)}</div>')
    return ''.join(blocks)


def _card(kind: str, prompt: str, text: str, title: str) -> str:
    return (
        f'<div class="sample"><h3 class="{escape(kind)}">{escape(title)}</h3>'
        f'<pre><mark>{escape(prompt)}</mark>{escape(text)}</pre></div>'
    )


def completions_page(samples: Samples) -> str:
    """Renders the page of every prompt and what each model made of it.

    Args:
        samples: as `side_by_side` takes them.

    Returns:
        HTML that loads nothing from elsewhere.
    """
    count = max(map(len, samples.values()), default=0)
    models = escape(', '.join(samples))
    body = (
        '<header><p class="kicker">Fractional: a distillation study</p>'
        f'<h1>{count} beginnings, and what each model made of them</h1></header>'
        f'<p class="note">In bold the beginning, that is the same for all; then what {models} '
        'wrote, each with the same seed. Where the beginning is of held-out text, its own '
        'continuation stands beside them. <a href="report.html">The report</a></p>'
        f'<section>{side_by_side(samples)}</section>'
    )
    return PAGE.format(title=escape('Fractional: completions'), body=body)
