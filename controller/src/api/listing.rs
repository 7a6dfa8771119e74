//! Lists, the same way for everything: pages, filters, orders, masks, and the token from which to
//! watch on.

use ::api::controller::*;
use ::api::errors::invalid_field;
use ::api::validate;
use prost::Message;
use prost_types::FieldMask;
use tonic::Status;

use super::{Api, store_status};
use crate::query::{Filter, Mask, Order, descriptor, dynamic};
use crate::store::{Item, Range};

/// Items that one request with a filter looks at; the next page goes on from there.
const MAX_SCANNED: usize = 10_000;
/// Items that one request may sort.
const MAX_SORTED: usize = 100_000;
/// Items read from the store in one go.
const BATCH: usize = 1_000;
/// Page tokens of sorted lists begin with this; no key does.
const OFFSET: &str = "offset:";

/// What every List request has.
pub(super) trait ListRequest {
    fn page(&self) -> (u32, &str);
    fn filter(&self) -> &str;
    fn order_by(&self) -> &str;
    fn read_mask(&self) -> Option<&FieldMask>;
}

macro_rules! list_requests {
    ($($request:ty),+ $(,)?) => {$(
        impl ListRequest for $request {
            fn page(&self) -> (u32, &str) {
                (self.page_size, &self.page_token)
            }
            fn filter(&self) -> &str {
                &self.filter
            }
            fn order_by(&self) -> &str {
                &self.order_by
            }
            fn read_mask(&self) -> Option<&FieldMask> {
                self.read_mask.as_ref()
            }
        }
    )+};
}
list_requests!(
    ListVmsRequest,
    ListVolumesRequest,
    ListNetworksRequest,
    ListSecurityGroupsRequest,
    ListHostsRequest,
    ListOperationsRequest,
    ListEventsRequest,
    ListFaultExperimentsRequest,
    ListPoolsRequest,
    ListProjectsRequest,
    ListAuditEntriesRequest,
);

/// What was asked of a list beside pages, checked.
pub(super) struct Query {
    kind: prost_reflect::MessageDescriptor,
    filter: Option<Filter>,
    order: Option<Order>,
    mask: Option<Mask>,
}

impl Query {
    /// Of a list of messages called `kind`.
    pub(super) fn of(kind: &str, request: &impl ListRequest) -> Result<Self, Status> {
        let kind = descriptor(kind);
        let mask = read_mask(&kind, request.read_mask())?;
        let order = Order::parse(&kind, request.order_by())
            .map_err(|error| invalid_field("order_by", error.to_string()))?;
        let filter = filter(&kind, request.filter())?;
        Ok(Self {
            kind,
            filter,
            order,
            mask,
        })
    }

    fn lets_through(&self, message: &impl Message) -> bool {
        let filter = self.filter.as_ref();
        filter.is_none_or(|filter| filter.matches(&dynamic(&self.kind, message)))
    }

    fn masked<T: Message + Default>(&self, message: T) -> T {
        match &self.mask {
            Some(mask) => mask.apply(&message),
            None => message,
        }
    }

    /// Filters, sorts and cuts what is whole already; see [`Api::list`].
    pub(super) fn page_of<T: Message + Default>(
        &self,
        mut items: Vec<T>,
        (size, token): (u32, &str),
    ) -> Result<(Vec<T>, String), Status> {
        items.retain(|item| self.lets_through(item));
        if let Some(order) = &self.order {
            let mut keyed: Vec<_> = items
                .into_iter()
                .map(|item| (order.key(&dynamic(&self.kind, &item)), item))
                .collect();
            // Stable: what is equal stays in the list's own order.
            keyed.sort_by(|(a, _), (b, _)| a.compare(b));
            items = keyed.into_iter().map(|(_, item)| item).collect();
        }
        let offset = match token {
            "" => 0,
            token => token
                .strip_prefix(OFFSET)
                .and_then(|offset| offset.parse::<usize>().ok())
                .ok_or_else(foreign_token)?,
        };
        let size = validate::page_size(size);
        let total = items.len();
        let end = offset.saturating_add(size);
        let next = match end < total {
            true => format!("{OFFSET}{end}"),
            false => String::new(),
        };
        let page = items.into_iter().skip(offset).take(size);
        Ok((page.map(|item| self.masked(item)).collect(), next))
    }
}

/// The filter of a request; `None` lets everything through.
pub(super) fn filter(
    kind: &prost_reflect::MessageDescriptor,
    text: &str,
) -> Result<Option<Filter>, Status> {
    if text.trim().is_empty() {
        return Ok(None);
    }
    Filter::parse(kind, text)
        .map(Some)
        .map_err(|error| invalid_field("filter", error.to_string()))
}

/// The mask of a request; `None` leaves everything.
pub(super) fn read_mask(
    kind: &prost_reflect::MessageDescriptor,
    mask: Option<&FieldMask>,
) -> Result<Option<Mask>, Status> {
    Mask::parse(kind, mask).map_err(|error| invalid_field("read_mask", error.to_string()))
}

/// One page and where to go on.
pub(super) struct Page<T> {
    pub(super) items: Vec<T>,
    pub(super) next_page_token: String,
    /// Watch from here to see what comes after the list.
    pub(super) resume_token: String,
    /// The same as the store has it.
    pub(super) revision: u64,
}

impl Api {
    /// One page of the `kind`s below `prefix`. `visible` makes what the caller sees of an item, or
    /// nothing if it is none of the list's.
    pub(super) async fn list<T: Message + Default>(
        &self,
        kind: &str,
        (prefix, reverse): (&str, bool),
        request: &impl ListRequest,
        visible: impl Fn(&Item) -> Result<Option<T>, Status>,
    ) -> Result<Page<T>, Status> {
        let query = Query::of(kind, request)?;
        let (size, token) = request.page();
        if query.order.is_some() {
            return self
                .sorted(&query, (prefix, reverse), (size, token), visible)
                .await;
        }
        if !token.is_empty() && !token.starts_with(prefix) {
            return Err(foreign_token());
        }
        let wanted = validate::page_size(size);
        let mut items = Vec::new();
        let mut after = (!token.is_empty()).then(|| token.to_owned());
        let mut revision = None;
        let mut scanned = 0;
        let mut more = true;
        while more && items.len() < wanted && scanned < MAX_SCANNED {
            let limit = if query.filter.is_some() {
                BATCH
            } else {
                wanted - items.len()
            };
            let range = Range {
                prefix: prefix.to_owned(),
                after: after.clone(),
                limit,
                reverse,
            };
            let listing = self.store.list(range).await.map_err(store_status)?;
            // What changes between two batches is watched from the first on.
            revision.get_or_insert(listing.revision);
            more = listing.more;
            let last = listing.items.len();
            for (index, item) in listing.items.iter().enumerate() {
                scanned += 1;
                after = Some(item.key.clone());
                if let Some(message) = visible(item)?
                    && query.lets_through(&message)
                {
                    items.push(query.masked(message));
                }
                if items.len() == wanted {
                    more |= index + 1 < last;
                    break;
                }
            }
            if last == 0 {
                break;
            }
        }
        let revision = revision.unwrap_or_default();
        Ok(Page {
            items,
            next_page_token: after.filter(|_| more).unwrap_or_default(),
            resume_token: revision.to_string(),
            revision,
        })
    }

    async fn sorted<T: Message + Default>(
        &self,
        query: &Query,
        (prefix, reverse): (&str, bool),
        page: (u32, &str),
        visible: impl Fn(&Item) -> Result<Option<T>, Status>,
    ) -> Result<Page<T>, Status> {
        let range = Range {
            prefix: prefix.to_owned(),
            limit: MAX_SORTED,
            reverse,
            ..Range::default()
        };
        let listing = self.store.list(range).await.map_err(store_status)?;
        if listing.more {
            let problem = format!(
                "there are more than {MAX_SORTED} to sort; name a project, or leave the order out"
            );
            return Err(invalid_field("order_by", problem));
        }
        let mut all = Vec::with_capacity(listing.items.len());
        for item in &listing.items {
            all.extend(visible(item)?);
        }
        let (items, next_page_token) = query.page_of(all, page)?;
        Ok(Page {
            items,
            next_page_token,
            resume_token: listing.revision.to_string(),
            revision: listing.revision,
        })
    }
}

fn foreign_token() -> Status {
    invalid_field("page_token", "is not from an earlier page of this list")
}
