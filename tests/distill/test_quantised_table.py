"""The table of quantised weights: what was measured stands in it, and nothing else."""

from distill.quantised_table import quantised_columns, quantised_rows

SUMMARY = {
    'quantised': [
        {'weights': 'float32', 'trained': False, 'bytes_on_disk': 4000, 'bytes_in_memory': 4000},
        {
            'weights': 'int8',
            'trained': True,
            'bytes_on_disk': 1100,
            'bytes_in_memory': 1050,
            'kl_from_student': {'value': 0.00123, 'low': 0.001, 'high': 0.0015},
        },
    ]
}


def test_what_was_not_measured_is_no_number():
    assert quantised_columns(SUMMARY) == ['float32', 'int8, trained']
    rows = {(row.label, row.unit): row.cells for row in quantised_rows(SUMMARY)}
    assert [cell.text for cell in rows['Bytes', 'on disk']] == ['4.00k', '1.10k']
    kl = rows['KL from student in floats', 'nats/token']
    assert [cell.text for cell in kl] == ['-', '0.00123']
    assert kl[1].interval == '0.00100 to 0.00150'
    assert len(rows) == 3
    assert quantised_columns({}) == quantised_rows({}) == []
