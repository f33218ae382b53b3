// The operators tierhints::attend_pages, append_states and read_states, which
// lib/progressive/kv/attention.py calls: states of several requests, of which tables say the places.
//
// A table is of a layer of a request, int64:
//
//   heads, size of a key, size of a value, bits of full numbers,
//   bits of keys as stored, as read, of values as stored, as read (of pages), number of pages,
//   then of each piece: rows a head, address of keys, address of values
//
// Pieces follow each other as their tokens do: the first is full, then come the pages, and then
// full ones again, whose keys and values lie side by side in a row.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace tierhints {
namespace {

using at::Tensor;

constexpr int64_t kTableHeader = 9, kPieceNumbers = 3;
constexpr int64_t kGrainProducts = 1 << 17;  // as in attention.cpp

struct Table {
  const int64_t* numbers;
  int64_t num_pieces;

  explicit Table(const Tensor& table) {
    TORCH_CHECK(table.scalar_type() == at::kLong && table.is_contiguous() && table.is_cpu() &&
                    table.numel() > kTableHeader &&
                    (table.numel() - kTableHeader) % kPieceNumbers == 0,
                "a table of places was expected");
    numbers = table.const_data_ptr<int64_t>();
    num_pieces = (table.numel() - kTableHeader) / kPieceNumbers;
    TORCH_CHECK(pages() >= 0 && pages() < num_pieces && numbers[1] % 16 == 0 &&
                    numbers[2] % 16 == 0,
                "a table of more pieces than pages, sizes multiples of 16, was expected");
  }
  int64_t heads() const { return numbers[0]; }
  int64_t key_size() const { return numbers[1]; }
  int64_t value_size() const { return numbers[2]; }
  int64_t full_bits() const { return numbers[3]; }
  int64_t pages() const { return numbers[8]; }
  bool is_page(int64_t piece) const { return piece > 0 && piece <= pages(); }
  const int64_t* piece(int64_t index) const {
    return numbers + kTableHeader + index * kPieceNumbers;
  }
  int64_t page_tokens() const { return pages() ? piece(1)[0] : kBlockCodes; }

  StateRows full_rows(int64_t size) const {
    return {static_cast<int>(full_bits()), size, key_size() + value_size(), Layout(1, 1, 0, 8, 8)};
  }
  // `bits`: those of keys in the header, or of values; of codes, rows of so many.
  StateRows page_rows(int64_t size, const int64_t* bits, int64_t rows, int64_t cols) const {
    const bool codes = bits[0] < 16;
    TORCH_CHECK(!codes || (*plane_bits(bits[0]) && *plane_bits(bits[1])), "codes of 2 to 8 bits");
    return {static_cast<int>(bits[1]), size, size,
            codes ? Layout(heads() * rows, cols, 0, bits[0], bits[1]) : Layout(1, 1, 0, 8, 8)};
  }
  StateRows page_keys() const {
    return page_rows(key_size(), numbers + 4, key_size(), page_tokens());
  }
  StateRows page_values() const {
    return page_rows(value_size(), numbers + 6, page_tokens(), value_size());
  }
};

// A request: what lies where, and the pieces that are seen.
struct Request {
  StateRows keys[2], values[2];
  std::vector<Piece> pieces;
  int64_t num_before;  // pieces that are seen before the first page
  int64_t num_pages;

  Request(const Table& table, int64_t length, int64_t window)
      : keys{table.full_rows(table.key_size()), table.page_keys()},
        values{table.full_rows(table.value_size()), table.page_values()},
        num_before(0), num_pages(0) {
    const int64_t first = window ? std::max<int64_t>(0, length - window) : 0;
    int64_t token = 0;
    for (int64_t index = 0; index < table.num_pieces && token < length; ++index) {
      const int64_t* const place = table.piece(index);
      const int64_t rows = place[0], count = std::min(rows, length - token);
      TORCH_CHECK(rows > 0 && rows <= kSpan, "pieces of 1 to ", kSpan, " tokens");
      TORCH_CHECK(!table.is_page(index) || (rows == table.page_tokens() && rows % 16 == 0 &&
                                            count == rows),
                  "whole pages of one size, a multiple of 16, were expected");
      const int64_t hidden = std::clamp<int64_t>(first - token, 0, count);
      token += count;
      if (hidden == count) continue;
      if (table.is_page(index)) ++num_pages;
      else if (!index) ++num_before;
      pieces.push_back({reinterpret_cast<const uint8_t*>(place[1]),
                        reinterpret_cast<const uint8_t*>(place[2]), rows, hidden, count});
    }
    TORCH_CHECK(token == length, "a table of ", length, " tokens was expected, not of ", token);
  }
};

const Kernels* open_kernels() {
  static const Kernels* const kernels = choose_kernels();
  TORCH_CHECK(kernels, "TIERHINTS_NATIVE names instructions that this processor doesn't have");
  return kernels;
}

// Cuts the pieces of a request into spans: they don't depend on other requests.
void add_spans(const Request& request, PageSpan span, int64_t groups, std::vector<PageSpan>* spans) {
  const Piece *piece = request.pieces.data(), *const last = piece + request.pieces.size();
  span.pages = piece + request.num_before;
  span.pages_end = span.pages + request.num_pages;
  for (int side = 0; side < 2; ++side) {
    span.keys[side] = request.keys + side, span.values[side] = request.values + side;
  }
  const float* const query = span.query;
  while (piece != last) {
    span.pieces = piece;
    for (int64_t scores = 0; piece != last; ++piece) {
      scores += round_up(piece->count, 16);
      if (scores > kSpanScores) break;
    }
    span.end = piece;
    for (span.group = 0; span.group < groups; ++span.group) {
      span.query = query + span.group * span.rows * request.keys[0].size;
      spans->push_back(span);
    }
  }
}

Tensor attend_pages(const Tensor& queries, at::TensorList tables, at::IntArrayRef lengths,
                    double scale, double softcap, int64_t window) {
  const Kernels* const kernels = open_kernels();
  const int64_t count = static_cast<int64_t>(tables.size());
  TORCH_CHECK(queries.dim() == 3 && queries.is_cpu() && queries.size(0) == count &&
                  static_cast<int64_t>(lengths.size()) == count && count > 0,
              "a query, a table and a length of each request were expected");
  const Table first(tables[0]);
  const int64_t groups = first.heads(), value_size = first.value_size();
  const int64_t rows = queries.size(1) / groups, size = first.key_size();
  TORCH_CHECK(queries.size(2) == size && queries.size(1) == rows * groups,
              "queries of shape ", queries.sizes(), " don't fit ", groups, " heads of ", size);
  const Tensor floats = queries.to(at::kFloat).contiguous();
  std::vector<Request> requests;
  requests.reserve(count);
  std::vector<PageSpan> spans;
  int64_t piece_rows = 0;
  for (int64_t index = 0; index < count; ++index) {
    const Table table(tables[index]);
    TORCH_CHECK(table.heads() == groups && table.key_size() == size &&
                    table.value_size() == value_size,
                "requests of one shape were expected");
    requests.emplace_back(table, lengths[index], window);
    for (const Piece& piece : requests.back().pieces) {
      piece_rows = std::max(piece_rows, piece.rows);
    }
    PageSpan span{};
    span.query = floats.const_data_ptr<float>() + index * groups * rows * size;
    span.rows = rows;
    span.request = index;
    span.scale = static_cast<float>(scale), span.softcap = static_cast<float>(softcap);
    add_spans(requests.back(), span, groups, &spans);
  }
  const int64_t num_spans = static_cast<int64_t>(spans.size());
  thread_local std::vector<float> memory;  // of the thread that calls
  memory.resize(std::max<size_t>(memory.size(), num_spans * rows * (value_size + 2)));
  float* const found = memory.data();
  auto* const partials = reinterpret_cast<Partial*>(found + num_spans * rows * value_size);
  const int64_t needed = page_floats(rows, piece_rows, std::max(size, value_size));
  const int64_t products = kSpan * rows * (size + value_size);
  at::parallel_for(
      0, num_spans, std::max<int64_t>(1, kGrainProducts / std::max<int64_t>(products, 1)),
      [&](int64_t begin, int64_t end) {
        thread_local std::vector<float> working;
        working.resize(std::max<size_t>(working.size(), needed));
        for (int64_t index = begin; index < end; ++index) {
          kernels->attend_pages(spans[index], found + index * rows * value_size,
                                partials + index * rows, working.data());
        }
      });
  const Tensor y = at::empty({count, groups * rows, value_size}, at::kFloat);
  const auto place = [&](int64_t index) {
    const PageSpan& span = spans[index / rows];
    return (span.request * groups + span.group) * rows + index % rows;
  };
  merge_partials(found, partials, num_spans * rows, value_size, place, y.mutable_data_ptr<float>(),
                 count * groups * rows);
  return queries.scalar_type() == at::kFloat ? y : y.to(queries.scalar_type());
}

// Writes one token of each request where its table has room: keys and values (requests, heads, size).
void append_states(const Tensor& keys, const Tensor& values, at::TensorList tables,
                   at::IntArrayRef tokens) {
  const int64_t count = static_cast<int64_t>(tables.size());
  TORCH_CHECK(keys.dim() == 3 && values.dim() == 3 && keys.is_cpu() && keys.size(0) == count &&
                  values.size(0) == count && static_cast<int64_t>(tokens.size()) == count &&
                  keys.scalar_type() == values.scalar_type(),
              "a key, a value, a table and a token of each request were expected");
  const Tensor key = keys.contiguous(), value = values.contiguous();
  const int64_t item = key.element_size();
  for (int64_t index = 0; index < count; ++index) {
    const Table table(tables[index]);
    const int64_t key_bytes = table.key_size() * item, value_bytes = table.value_size() * item;
    TORCH_CHECK(keys.size(1) == table.heads() && values.size(1) == table.heads() &&
                    keys.size(2) == table.key_size() && values.size(2) == table.value_size() &&
                    item * 8 == table.full_bits(),
                "keys and values of shapes ", keys.sizes(), " and ", values.sizes(),
                " don't fit a table");
    int64_t row = tokens[index], piece = 0;
    while (piece < table.num_pieces && row >= table.piece(piece)[0]) row -= table.piece(piece++)[0];
    TORCH_CHECK(row >= 0 && piece < table.num_pieces && !table.is_page(piece), "token ",
                tokens[index], " isn't full");
    const int64_t* const place = table.piece(piece);
    auto* to = reinterpret_cast<uint8_t*>(place[1]) + row * (key_bytes + value_bytes);
    const auto* from_key = static_cast<const uint8_t*>(key.const_data_ptr());
    const auto* from_value = static_cast<const uint8_t*>(value.const_data_ptr());
    for (int64_t head = 0; head < table.heads(); ++head) {
      const int64_t at = index * table.heads() + head;
      std::memcpy(to, from_key + at * key_bytes, key_bytes);
      std::memcpy(to + key_bytes, from_value + at * value_bytes, value_bytes);
      to += place[0] * (key_bytes + value_bytes);
    }
  }
}

// Copies full tokens from `start` on to keys and values (tokens, heads, size), as many as those have.
void read_states(const Tensor& given, int64_t start, const Tensor& keys, const Tensor& values) {
  const Table table(given);
  const int64_t item = table.full_bits() / 8, count = keys.size(0);
  const int64_t key_bytes = table.key_size() * item, value_bytes = table.value_size() * item;
  for (const Tensor* side : {&keys, &values}) {
    const int64_t size = side == &keys ? table.key_size() : table.value_size();
    TORCH_CHECK(side->dim() == 3 && side->is_cpu() && side->is_contiguous() &&
                    side->size(0) == count && side->size(1) == table.heads() &&
                    side->size(2) == size && side->element_size() == item,
                "room for tokens of ", table.heads(), " heads was expected, not ", side->sizes());
  }
  auto* to_key = static_cast<uint8_t*>(keys.mutable_data_ptr());
  auto* to_value = static_cast<uint8_t*>(values.mutable_data_ptr());
  int64_t piece = 0, row = start;
  for (int64_t token = 0; token < count; ++token, ++row) {
    while (piece < table.num_pieces && row >= table.piece(piece)[0]) row -= table.piece(piece++)[0];
    TORCH_CHECK(row >= 0 && piece < table.num_pieces && !table.is_page(piece), "token ",
                start + token, " isn't full");
    const int64_t* const place = table.piece(piece);
    const auto* from = reinterpret_cast<const uint8_t*>(place[1]) + row * (key_bytes + value_bytes);
    for (int64_t head = 0; head < table.heads(); ++head) {
      std::memcpy(to_key, from, key_bytes);
      std::memcpy(to_value, from + key_bytes, value_bytes);
      to_key += key_bytes, to_value += value_bytes;
      from += place[0] * (key_bytes + value_bytes);
    }
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tierhints, library) {
  library.def(
      "attend_pages(Tensor queries, Tensor[] tables, int[] lengths, float scale, float softcap, "
      "int window) -> Tensor");
  library.def(
      "append_states(Tensor keys, Tensor values, Tensor[] tables, int[] tokens) -> ()");
  library.def(
      "read_states(Tensor table, int start, Tensor(a!) keys, Tensor(b!) values) -> ()");
}

TORCH_LIBRARY_IMPL(tierhints, CPU, library) {
  library.impl("attend_pages", attend_pages);
  library.impl("append_states", append_states);
  library.impl("read_states", read_states);
}

}  // namespace tierhints
