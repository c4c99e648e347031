-- How a table is laid out, for pandoc's HTML and typst writers; the third filter of the report.
--
-- In HTML a wide table scrolls. On paper it cannot: its type gets smaller, then names break at
-- their joints, then its columns are dealt out over several panels below each other.

local HTML = FORMAT:match("html") ~= nil

local function raw(text)
  return pandoc.RawBlock("typst", text)
end

local function append(list, more)
  for _, item in ipairs(more) do
    list:insert(item)
  end
end

local LONG = 40 -- from so many characters on, a column holds running text and is given room to wrap
local SHORT = 16 -- up to so many characters, a name in the first column stays in one piece
local GAP = 2 -- the space between two columns, in characters
local BOLD = 1.15 -- how much wider a heading is than as many characters of text
local NUMBER = "^[+%-]?[%d%.,]+[eE]?[+%-]?%d*%%?$"
local NUMBERS = "^[%d%.+%-]+, [%d%.,+%- ]+$" -- several, such as those of single seeds
local JOINTS = "[/_%-%.=,:]"

local function is_number(text)
  text = text:gsub("%s*\u{25b2}$", ""):gsub("%s*\u{25bc}$", "") -- higher, lower than SFT
  text = text:gsub("\u{2212}", "-"):gsub("%s*\u{b1}.*$", ""):gsub("%s*[%[%(].*[%]%)]$", "")
  return text == "" or text == "NaN" or text == "\u{2013}" or text == "\u{2014}"
    or text:match(NUMBER) ~= nil or text:match(NUMBERS) ~= nil
end

local function characters(text)
  return utf8.len(text) or #text
end

-- The longest piece that cannot be broken over two lines.
local function longest_piece(text)
  local longest = 0
  for piece in text:gsub(JOINTS, "%0 "):gmatch("%S+") do
    longest = math.max(longest, characters(piece))
  end
  return longest
end

local function all_rows(tbl)
  local rows = pandoc.List({})
  append(rows, tbl.head.rows)
  for _, body in ipairs(tbl.bodies) do
    append(rows, body.head)
    append(rows, body.body)
  end
  return rows
end

-- Calls `visit(column, cell, in_head)` for each cell of one column, and says whether all are.
local function each_cell(tbl, visit)
  local covered, plain = {}, true -- `covered`: rows that a cell from above still reaches, by column
  for number, row in ipairs(all_rows(tbl)) do
    local column = 1
    local function skip_covered()
      while (covered[column] or 0) > 0 do
        covered[column] = covered[column] - 1
        column = column + 1
      end
    end
    for _, cell in ipairs(row.cells) do
      skip_covered()
      if cell.col_span == 1 then
        visit(column, cell, number <= #tbl.head.rows)
      end
      plain = plain and cell.col_span == 1 and cell.row_span == 1
      for i = column, column + cell.col_span - 1 do
        covered[i] = cell.row_span - 1
      end
      column = column + cell.col_span
    end
    skip_covered()
  end
  return plain
end

-- What the layout needs to know about each column, widths counted in characters.
local function measure(tbl)
  local columns = pandoc.List({})
  for i = 1, #tbl.colspecs do
    columns[i] = { numeric = true, natural = 2, least = 2 }
  end
  local plain = each_cell(tbl, function(i, cell, in_head)
    local text, column = pandoc.utils.stringify(cell.contents), columns[i]
    if column then
      local wider = in_head and BOLD or 1
      local length = characters(text) * wider
      column.natural = math.max(column.natural, length)
      -- a number, and a short name of a row, is kept on one line; a long name breaks at its joints
      local whole = is_number(text) and not in_head or i == 1 and length <= SHORT
      local least = whole and length or longest_piece(text) * wider
      column.least = math.max(column.least, least)
      column.numeric = column.numeric and (in_head or is_number(text))
    end
  end)
  return columns, plain
end

local function total(columns, key)
  local sum = 0
  for _, column in ipairs(columns) do
    sum = sum + column[key] + GAP
  end
  return sum
end

-- Numbers to the right, text to the left, and a heading over several columns in their middle.
local function align_columns(tbl, columns)
  for i, column in ipairs(columns) do
    tbl.colspecs[i] = { column.numeric and "AlignRight" or "AlignLeft", nil }
  end
  for _, row in ipairs(all_rows(tbl)) do
    for _, cell in ipairs(row.cells) do
      cell.alignment = cell.col_span > 1 and "AlignCenter" or "AlignDefault"
    end
  end
end

-- Share the full width by `weight(column)`.
local function set_widths(tbl, columns, weight)
  local sum = 0
  for _, column in ipairs(columns) do
    sum = sum + weight(column)
  end
  for i, column in ipairs(columns) do
    tbl.colspecs[i] = { tbl.colspecs[i][1], weight(column) / sum }
  end
end

local function by_length_of_text(column)
  return math.max(math.min(column.natural, 120) ^ 0.8, column.least) + GAP
end

-- To each column what it cannot do without; what is left of the line, where text would wrap.
local function by_need(columns, line)
  local least = total(columns, "least")
  local share = math.max(0, line - least) / math.max(1, total(columns, "natural") - least)
  return function(column)
    return column.least + GAP + share * (column.natural - column.least)
  end
end

local function soften(str)
  if #str.text > 8 and not is_number(str.text) then
    return pandoc.Str((str.text:gsub(JOINTS, "%0\u{200b}"))) -- a line may break here
  end
end

-- A copy of the table with its first column, which names the rows, and columns `from` to `to`.
local function panel(tbl, from, to)
  local copy = tbl:clone()
  local function pick(list)
    local picked = pandoc.List({ list[1] })
    for i = from, to do
      picked:insert(list[i])
    end
    return picked
  end
  local function pick_rows(rows)
    return rows:map(function(row) return pandoc.Row(pick(row.cells)) end)
  end
  copy.colspecs = pick(tbl.colspecs)
  copy.head = pandoc.TableHead(pick_rows(tbl.head.rows))
  copy.bodies = tbl.bodies:map(function(body)
    body = body:clone()
    body.head, body.body = pick_rows(body.head), pick_rows(body.body)
    return body
  end)
  return copy, pick
end

-- A page of A4 holds about so many characters of 1 pt beside each other; measured, with some slack.
local POINTS_PER_LINE = 870
local LARGEST, SMALLEST, TINY = 9, 6.5, 5

-- Choose the size and the widths; a table that is still too wide is split into panels.
local function typst_table(tbl, columns, plain)
  local size = LARGEST
  local line = POINTS_PER_LINE / SMALLEST
  if columns:find_if(function(column) return column.natural >= LONG end) then
    size = 8
    set_widths(tbl, columns, by_length_of_text)
  elseif total(columns, "natural") > POINTS_PER_LINE / LARGEST then
    if total(columns, "least") > line and plain and #columns > 3 then
      local first = columns[1].least + GAP
      local panels = math.ceil((total(columns, "least") - first) / math.max(line - first, line / 2))
      local share = math.ceil((#columns - 1) / math.max(panels, 2))
      local blocks = pandoc.Blocks({})
      for from = 2, #columns, share do
        local part, pick = panel(tbl, from, math.min(from + share - 1, #columns))
        append(blocks, typst_table(part, pick(columns), false))
      end
      return blocks
    end
    size = math.max(TINY, math.min(LARGEST, POINTS_PER_LINE / total(columns, "least")))
    set_widths(tbl, columns, by_need(columns, POINTS_PER_LINE / size))
  end
  return { raw(("#report-table(%.1fpt)["):format(size)), tbl:walk({ Str = soften }), raw("]") }
end

local function layout_table(tbl)
  local columns, plain = measure(tbl)
  align_columns(tbl, columns)
  tbl.attr = pandoc.Attr()
  tbl.caption = { long = {} }
  if not HTML then
    for _, row in ipairs(tbl.head.rows) do
      for _, cell in ipairs(row.cells) do
        cell.contents = cell.contents:walk({
          Plain = function(block) return pandoc.Plain({ pandoc.Strong(block.content) }) end,
        })
      end
    end
    return typst_table(tbl, columns, plain), false
  end
  each_cell(tbl, function(i, cell, in_head)
    if columns[i] and columns[i].numeric and not in_head then
      cell.contents = cell.contents:walk({
        Str = function(str) return pandoc.Str((str.text:gsub("%-(%d)", "−%1"))) end, -- as typst does
      })
    end
  end)
  local kind = "table-data"
  if columns:find_if(function(column) return column.natural >= LONG end) then
    kind = "table-text"
    set_widths(tbl, columns, by_length_of_text)
  end
  return pandoc.Div(tbl, pandoc.Attr("", { kind })), false
end

return { { traverse = "topdown", Table = layout_table } }
