-- What each request goes through before TorchServe sees it: its token, its host, its declared length, its path without a query, and its
-- form, taken apart and written anew.
-- `configuration.py` writes constants in front of this file: KEY_FILE (nil where no token is asked), MAX_BODY_BYTES, MAX_FORM_FIELDS.

local MAX_PART_HEADER_BYTES = 4096
local LARGE_BYTES = 1048576 -- a body of more is garbage worth collecting at once
local FORM = "application/x-www-form-urlencoded"
local RAW = "application/octet-stream" -- as which the handler reads images, arrays and JSON by their own first bytes
local CHARSETS = {["utf-8"] = true, ["utf8"] = true, ["us-ascii"] = true, ["iso-8859-1"] = true}
local IDENTITIES = {["7bit"] = true, ["8bit"] = true, ["binary"] = true}

-- Replies: in the API's form, on the routes of the Open Inference Protocol in that protocol's.

local function respond(handle, headers, body)
  handle:headers():replace("x-envoy-answered", "true") -- so that the proxy leaves this body as it is
  handle:respond(headers, body)
end

local function refuse(handle, status, kind, message)
  local inner = string.format('"code": %d, "type": "%s"', status, kind)
  local body = string.format('{"error": {%s, "message": "%s"}}', inner, message)
  if handle:headers():get(":path"):find("/v2/", 1, true) == 1 then
    body = string.format('{"error": "%s", %s}', message, inner)
  end
  respond(handle, {[":status"] = tostring(status), ["content-type"] = "application/json"}, body)
end

local NOT_PERMITTED = "Token Authorization failed. Token either incorrect, expired, or not provided correctly"

-- As TorchServe itself refuses a token, so that a client sees no difference.
local function refuse_token(handle)
  if (handle:headers():get("content-type") or ""):find("application/grpc", 1, true) == 1 then
    return respond(handle, {[":status"] = "403"}, NOT_PERMITTED) -- which the proxy turns into gRPC's PERMISSION_DENIED
  end
  local body = string.format('{\n  "code": 400,\n  "type": "InvalidKeyException",\n  "message": "%s"\n}\n', NOT_PERMITTED)
  respond(handle, {[":status"] = "400", ["content-type"] = "application/json"}, body)
end

-- The token: read anew for each request, as the API key renews it. The file is TorchServe's key_file.json, or holds a token alone.

local last_token = nil -- while TorchServe writes its file, that is empty

local function read_token()
  local file = io.open(KEY_FILE, "r")
  if file then
    local text = file:read("*a")
    file:close()
    last_token = text:match('"inference"%s*:%s*{%s*"key"%s*:%s*"([^"]+)"') or text:match("^%s*([%w_%-%.~%+/=]+)%s*$") or last_token
  end
  return last_token
end

-- A token that TorchServe had before the launcher replaced it. The file stands beside the key file; often there is none.
local function is_former(given)
  local file = io.open((KEY_FILE:match("^.*/") or "") .. "former_tokens", "r")
  local found = false
  if file then
    for line in file:lines() do
      found = found or line == given
    end
    file:close()
  end
  return found
end

-- Whether a request has the token; one of a former TorchServe is exchanged for the one that the present TorchServe knows.
local function is_permitted(headers)
  local authorization = headers:get("authorization")
  local given = authorization and authorization:match("^Bearer ([^%s]+)$")
  local token = read_token()
  if given ~= nil and given ~= token and token ~= nil and is_former(given) then
    headers:replace("authorization", "Bearer " .. token)
    return true
  end
  return given ~= nil and given == token
end

-- Forms. An error is a message, for a person.

-- `curl --data-binary @form.txt` sends the file's last line break.
local function strip_line_breaks(body)
  local last = #body
  while last > 0 and (body:byte(last) == 10 or body:byte(last) == 13) do
    last = last - 1
  end
  return body:sub(1, last)
end

local function is_hexadecimal(byte)
  return byte ~= nil and ((byte >= 48 and byte <= 57) or (byte >= 65 and byte <= 70) or (byte >= 97 and byte <= 102))
end

-- Reads a form of fields, name=value&name=value. Returns whether it is one, and a message where it is a bad one. Byte by byte: LuaJIT
-- compiles such a loop, and of patterns it compiles none.
local function read_form(body)
  if not body:find("^[%w_%.%-%%%+%[%]]+=") then
    return false
  end
  local fields, escapes_are_good = 1, true
  for at = 1, #body do
    local byte = body:byte(at)
    if byte < 33 or byte > 126 then
      return false
    elseif byte == 38 then -- &
      fields = fields + 1
    elseif byte == 37 then -- %
      escapes_are_good = escapes_are_good and is_hexadecimal(body:byte(at + 1)) and is_hexadecimal(body:byte(at + 2))
    end
  end
  if fields > MAX_FORM_FIELDS then
    return true, string.format("expected at most %d fields in a form, got more", MAX_FORM_FIELDS)
  elseif not escapes_are_good then
    return true, "expected two hexadecimal digits after each percent sign of a form, got others"
  end
  return true
end

local function read_boundary(content_type)
  local given = content_type:match('[;%s][bB][oO][uU][nN][dD][aA][rR][yY]="([^"]+)"')
    or content_type:match("[;%s][bB][oO][uU][nN][dD][aA][rR][yY]=([^;%s\"]+)")
  if given and #given <= 200 and not given:find("[^%w'%(%)%+_,%-%./:=%?]") then
    return given
  end
end

-- Reads a part's headers. Returns what the part is written anew with, or nil and a message.
local function read_part_headers(block)
  local disposition, content_type
  for line in (block .. "\r\n"):gmatch("(.-)\r\n") do
    local name, value = line:match("^([%w%-]+):[ \t]*([^%z\1-\8\10-\31\127]-)[ \t]*$")
    if not name then
      return nil, "expected 'name: value' in each header line of a form's part, got another line"
    end
    name = name:lower()
    if name == "content-disposition" and not disposition then
      disposition = value
    elseif name == "content-type" and not content_type then
      content_type = value
    elseif name == "content-disposition" or name == "content-type" then
      return nil, "expected each header of a form's part once, got one twice"
    elseif name == "content-transfer-encoding" and not IDENTITIES[value:lower()] then
      return nil, "expected the plain bytes in a form's part, got another Content-Transfer-Encoding"
    end
  end
  local parameters = disposition and disposition:match("^[fF][oO][rR][mM]%-[dD][aA][tT][aA][ \t]*(;.*)$")
  if not parameters then
    return nil, "expected 'Content-Disposition: form-data; name=...' in each part of a form, got a part without it"
  end
  local name = parameters:match(';[ \t]*[nN][aA][mM][eE]="([^"]*)"') or parameters:match(";[ \t]*[nN][aA][mM][eE]=([^%s;\"]+)")
  if not name or not name:find("^[%w_%-%.]+$") or #name > 100 then
    return nil, "expected a name of letters, digits, underscores, hyphens and dots for each field of a form, got another"
  end
  local written = 'Content-Disposition: form-data; name="' .. name .. '"'
  if parameters:find(";[ \t]*[fF][iI][lL][eE][nN][aA][mM][eE]%*?=") then
    written = written .. '; filename="file"'
  end
  if content_type then
    local media_type, rest = content_type:lower():match("^([%w%.%+%-]+/[%w%.%+%-%*]+)[ \t]*(.*)$")
    local charset = rest and rest:match(";[ \t]*charset=\"?([%w%-_]+)\"?")
    if not media_type or media_type:find("^multipart/") or (charset and not CHARSETS[charset]) then
      return nil, "expected a media type in UTF-8, ASCII or bytes as the Content-Type of a form's part, got another"
    end
    written = written .. "\r\nContent-Type: " .. media_type
  end
  return written
end

-- Takes a multipart form apart and writes it anew. Returns its bytes, or nil and a message.
local function rewrite_multipart(body, boundary)
  local delimiter, written, count = "--" .. boundary, {}, 0
  local early = "expected a form that ends with its boundary and two hyphens, got one that ends early"
  if body:sub(1, 2) == "\r\n" then
    body = body:sub(3)
  end
  if body:sub(1, #delimiter) ~= delimiter then
    return nil, "expected a form that begins with the boundary of its Content-Type, got other bytes"
  end
  local at = #delimiter + 1
  while body:sub(at, at + 1) ~= "--" do
    local start = body:match("^[ \t]*\r\n()", at)
    if not start then
      return nil, #body < at + 1 and early or "expected a line break after each boundary of a form, got other bytes"
    end
    local ending, after = body:find("\r\n" .. delimiter, start - 2, true)
    local headers_end = body:sub(start, start + MAX_PART_HEADER_BYTES):find("\r\n\r\n", 1, true)
    if not ending then
      return nil, early
    end
    if not headers_end or start + headers_end + 3 > ending + 2 then
      return nil, "expected headers and an empty line in each part of a form, got a part without them"
    end
    count = count + 1
    if count > MAX_FORM_FIELDS then
      return nil, string.format("expected at most %d fields in a form, got more", MAX_FORM_FIELDS)
    end
    local headers, mistake = read_part_headers(body:sub(start, start + headers_end - 2))
    if not headers then
      return nil, mistake
    end
    written[#written + 1] = delimiter .. "\r\n" .. headers .. "\r\n\r\n"
    written[#written + 1] = body:sub(start + headers_end + 3, ending - 1)
    written[#written + 1] = "\r\n"
    at = after + 1
  end
  if count == 0 then
    return nil, "expected at least one field in a form, got none"
  end
  written[#written + 1] = delimiter .. "--\r\n"
  return table.concat(written)
end

local function read_body(handle)
  local body = handle:body(true)
  return body, body:getBytes(0, body:length())
end

local function check(handle)
  local headers = handle:headers()
  if KEY_FILE and not is_permitted(headers) then
    return refuse_token(handle)
  end
  if not (headers:get(":authority") or ""):find("^[%w%.%-:%[%]]+$") then -- two of them come as one with a comma
    return refuse(handle, 400, "InvalidRequest", "expected one host name in the header Host")
  end
  local path = headers:get(":path")
  local query = path:find("?", 1, true)
  if query then
    headers:replace(":path", path:sub(1, query - 1)) -- the API has none
  end
  -- What is a little too large is read, and refused at its limit by the buffer filter: many clients send all before they read.
  if (tonumber(headers:get("content-length") or "0") or 0) > 2 * MAX_BODY_BYTES then
    return refuse(handle, 413, "RequestTooLarge", string.format("expected at most %d bytes in a body, got more", MAX_BODY_BYTES))
  end
  local content_type = headers:get("content-type") or ""
  local media_type = content_type:lower():match("^[ \t]*([^;%s]*)")
  if media_type == FORM then
    local body, bytes = read_body(handle)
    local form = strip_line_breaks(bytes)
    local is_form, mistake = read_form(form)
    if not is_form then
      handle:headers():replace("content-type", RAW)
      return
    end
    if mistake then
      return refuse(handle, 400, "InvalidRequest", mistake)
    end
    handle:headers():replace("content-type", FORM)
    body:setBytes(form)
  elseif media_type:find("multipart", 1, true) or media_type:find("form-urlencoded", 1, true) then
    local boundary = media_type == "multipart/form-data" and read_boundary(content_type)
    if not boundary then
      headers:replace("content-type", RAW) -- no form; the handler says what is wrong
      return
    end
    local body, bytes = read_body(handle)
    local form, mistake = rewrite_multipart(bytes, boundary)
    if not form then
      return refuse(handle, 400, "InvalidRequest", mistake)
    end
    handle:headers():replace("content-type", 'multipart/form-data; boundary="' .. boundary .. '"')
    body:setBytes(form)
    if #bytes > LARGE_BYTES then
      bytes, form = nil, nil
      collectgarbage()
    end
  end
end

-- The proxy passes on what a script fails at. This one refuses it.
function envoy_on_request(handle)
  if not pcall(check, handle) then
    refuse(handle, 500, "ProxyError", "the request could not be checked")
  end
end
